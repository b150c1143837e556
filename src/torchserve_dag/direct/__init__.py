"""The direct host: models behind HTTP in their own process, with no server between them and their clients.

    http.py       the network side: uvicorn
    app.py        one request: which model, what of its body, the answer or its chunks, a client that leaves
    forms.py      a form's parts
    leaving.py    a client that leaves before its answer is there
    entrance.py   between the event loop and the model's threads: many requests enter with one step, and answers come
                  back with one wake-up
    open_inference/  requests and answers as tensors: the Open Inference Protocol
    main_thread.py          what is different where the model has the process's main thread
    torchserve_archive/     unedited archives of TorchServe's, whose models have it

Of an archive it uses nothing but the `Service` of `runtime/worker/protocol.py`. No code of a model runs on the event
loop.
"""
