"""The Open Inference Protocol (KServe's version 2) of the direct host, over REST and gRPC.

    rest.py, grpc.py   a call in its protocol's form: JSON with binary tensors, or protobuf; and its answer
    calls.py           what is asked of the server or a model, whichever protocol it came by
    signature.py       a model's message as input tensors, its answer as output tensors, by what `build.json` says
    requests.py        input tensors to requests of the model, one for each element of the first dimension
    answers.py         the model's answers to output tensors
    tensors.py         datatypes, shapes, and elements as raw bytes

The standard: https://github.com/kserve/open-inference-protocol. `protos/` has its .proto file (of the commit eeb043e),
and the code that `scripts/stubs` makes of it. The binary tensors are Triton's extension of it.
"""
