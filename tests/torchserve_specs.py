"""Workflow specifications, and what TorchServe 0.12.0 makes of each; a live test asks it again.

Those in OWN have the names and the shape of every specification in TorchServe's documentation, examples and tests,
with archives that lie in the model store.
"""

from __future__ import annotations

import json
import textwrap
import zipfile
from pathlib import Path

MODEL = """
class Echo:
    def initialize(self, context): pass
    def handle(self, data, context):
        return [{"model": sorted(row), "body": [bytes(row[key]).decode() for key in sorted(row)]} for row in data]
"""
FUNCTIONS = """
    import json
    def made(name):
        def function(data, context):
            return data and [{"function": name, **{k: bytes(row[k]).decode() for k in sorted(row)}} for row in data]
        return function
    pre_processing = preprocessing = function1 = made("first")
    postprocessing = post_processing = function2 = made("last")
    aggregate_func, prep_intermediate_input = made("joined"), made("between")
    a, b, c, d, e, f = map(made, "abcdef")
    text = lambda data, context: data and ["no JSON"] * len(data)
    constant = 3
    class NotAFunction: ...
"""
STORE = "STORE"
"""Stands in a text for the path of the model store."""

_COMMON = {"min-workers": 1, "max-workers": 1, "batch-size": 4, "max-batch-delay": 100, "retry-attempts": 5}
_LONG = f"models: {json.dumps({**_COMMON, 'timeout-ms': 300000})[:-1]}, "


def _text(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


OWN = {
    "documentation, whole": _text("""
        models:
            min-workers: 1
            max-workers: 4
            batch-size: 3
            max-batch-delay : 50
            retry-attempts : 3
            timeout-ms : 5000
            m1:
               url : model1.mar
               min-workers: 1
               max-workers: 2
               batch-size: 4

            m2:
               url : model2.mar

            m3:
               url : model3.mar
               batch-size: 3

            m4:
              url : model4.mar

        dag:
          pre_processing : [m1]
          m1 : [m2]
          m2 : [m3]
          m3 : [m4]
          m4 : [postprocessing]
    """),
    "documentation, sequence": _text("""
        models: {model1: {url: model1.mar}, model2: {url: model2.mar}}
        dag:
          function1 : [model1]
          model1 : [model2]
          model2 : [function2]
    """),
    "documentation, parallel": _text("""
        models: {model1: {url: model1.mar}, model2: {url: model2.mar}}
        dag:
          pre_processing: [model1, model2]
          model1: [aggregate_func]
          model2: [aggregate_func]
    """),
    "dog breeds": _LONG
    + _text("""
        cat_dog_classification: {url: model1.mar}, dog_breed_classification: {url: model2.mar}}
        dag:
          pre_processing: [cat_dog_classification, dog_breed_classification]
          cat_dog_classification: [dog_breed_classification]
    """),
    "two translations": _LONG
    + _text("""
        nmt_en_de: {url: model1.mar}, nmt_en_fr: {url: model2.mar}}
        dag:
          pre_processing: [nmt_en_de, nmt_en_fr]
          nmt_en_de: [aggregate_func]
          nmt_en_fr: [aggregate_func]
    """),
    "translation and back": _LONG
    + _text("""
        nmt_en_de: {url: model1.mar}, nmt_de_en: {url: model2.mar}}
        dag:
          nmt_en_de: [prep_intermediate_input]
          prep_intermediate_input: [nmt_de_en]
          nmt_de_en: [post_processing]
    """),
    "test, several outputs joined": _text("""
        models:
            min-workers: 1
            max-workers: 4
            batch-size: 3
            max-batch-delay : 50
            resnet:
               url : model1.mar
               batch-size: 3

            squeezenet:
              url : model2.mar

        dag:
          pre_processing : [resnet, squeezenet]
          resnet : [aggregate_func]
          squeezenet : [aggregate_func]"""),
    "test, several outputs": _text("""
        models:
            min-workers: 1
            max-workers: 4
            batch-size: 3
            max-batch-delay : 50
            resnet:
               url : model1.mar
               batch-size: 3

            squeezenet:
              url : model2.mar

        dag:
          pre_processing : [resnet, squeezenet]"""),
    "test, densenet": _text("""
        models:
            min-workers: 1
            max-workers: 2
            batch-size: 3
            max-batch-delay : 50

            densenet:
              url : model1.mar

        dag:
          pre_processing : [densenet]
          densenet : [post_processing]"""),
    "test, smtest": _text("""
        models:
            min-workers: 1
            max-workers: 1
            batch-size: 8
            m1:
               url: model1.mar
               min-workers: 1
               max-workers: 1
               batch-size: 4

        dag:
          preprocessing: [m1]
          m1: [postprocessing]
    """),
    "test, memory errors": _text("""
        models:
            min-workers: 1
            max-workers: 1
            batch-size: 1
            loading-memory-error:
               url: model1.mar
               min-workers: 1
               max-workers: 1
               batch-size: 1

        dag:
          preprocessing: [loading-memory-error]
          loading-memory-error: [postprocessing]
    """),
    "test, retries and timeouts": _text("""
        models:
            min-workers: 1
            max-workers: 1
            batch-size: 8
            retry-attempts : 5
            timeout-ms : 2000
            pred-err:
               url: model1.mar
               min-workers: 1
               max-workers: 1
               batch-size: 4

        dag:
          preprocessing: [pred-err]
          pred-err: [postprocessing]
    """),
    "test, a graph in Java": "models: {}\ndag: {a: [b, c, d], b: [e], e: [f], c: [f], d: [f]}\n",
}
"""TorchServe's own. It registers and answers them all."""

ANSWERED = {
    "a model alone": "models: {m: {url: model1.mar}}\ndag: {m: []}\n",
    "a function alone": "models: {}\ndag: {a: []}\n",
    "near and far": "models: {}\ndag: {a: [b, c], b: [c]}\n",
    "blank children": "models: {}\ndag: {a: [b, '', ' ', null, ~]}\n",
    "unknown section": "models: {}\ndag: {a: [b]}\nversion: 1\n",
    "a lambda": "models: {}\ndag: {text: []}\n",
    "named request": "models: {request: {url: model1.mar}}\ndag: {a: [request]}\n",
    "named parameters": "models: {parameters: {url: model1.mar}}\ndag: {a: [parameters]}\n",
    "named answer": "models: {answer: {url: model1.mar}}\ndag: {a: [answer, b]}\n",
    "hyphens and dots": "models: {my.model-1: {url: model1.mar}}\ndag: {a: [my.model-1]}\n",
    "a model with a function's name": "models: {b: {url: model1.mar}}\ndag: {a: [b]}\n",
    "one archive twice": "models: {x: {url: model1.mar}, y: {url: model1.mar}}\ndag: {x: [y]}\n",
    "an archive by a path": f"models: {{m: {{url: {STORE}/model1.mar}}}}\ndag: {{m: []}}\n",
    "an archive by a path that is not there": "models: {m: {url: nonesuch/model1.mar}}\ndag: {m: []}\n",
    "an archive's folder": "models: {m: {url: folder}}\ndag: {m: []}\n",
    "an unused model without an archive": "models: {m: {url: nonesuch.mar}}\ndag: {a: []}\n",
    "an unused model without a url": "models: {m: {}}\ndag: {a: []}\n",
    "an unused model that never answers": "models: {m: {url: model1.mar, timeout-ms: 0}}\ndag: {a: []}\n",
    "an unknown key in a model": "models: {m: {url: model1.mar, made-by: me}}\ndag: {m: []}\n",
    "batch size 0": "models: {m: {url: model1.mar, batch-size: 0}}\ndag: {m: []}\n",
    "batch size -2": "models: {m: {url: model1.mar, batch-size: -2}}\ndag: {m: []}\n",
    "an octal number": "models: {m: {url: model1.mar, batch-size: 010}}\ndag: {m: []}\n",
    "a hexadecimal number": "models: {m: {url: model1.mar, batch-size: 0x10}}\ndag: {m: []}\n",
    "a number with an underscore": "models: {m: {url: model1.mar, batch-size: 1_0}}\ndag: {m: []}\n",
    "retries -1": "models: {m: {url: model1.mar, retry-attempts: -1}}\ndag: {m: []}\n",
    "retries 20": "models: {m: {url: model1.mar, retry-attempts: 20}}\ndag: {m: []}\n",
    "no least worker": "models: {m: {url: model1.mar, min-workers: 0}}\ndag: {m: []}\n",
    "least above most": "models: {m: {url: model1.mar, min-workers: 3, max-workers: 1}}\ndag: {m: []}\n",
    "delay -1": "models: {m: {url: model1.mar, max-batch-delay: -1}}\ndag: {m: []}\n",
    "anchors": "models: {m: &one {url: model1.mar}, n: {<<: *one, batch-size: 2}}\ndag: {m: [n]}\n",
    "a common setting below": "models: {m: {url: model1.mar}, batch-size: 7}\ndag: {m: []}\n",
}
"""Others that it registers and answers."""

REFUSED = {
    "a cycle of one": "models: {}\ndag: {a: [a]}\n",
    "a cycle of two": "models: {}\ndag: {a: [b], b: [a]}\n",
    "a cycle behind the start": "models: {}\ndag: {a: [b], b: [c], c: [d], d: [b]}\n",
    "a cycle in Java": "models: {}\ndag: {a: [b, c, d], b: [e], e: [f], c: [f], d: [f], f: [b]}\n",
    "two starts": "models: {}\ndag: {a: [c], b: [c]}\n",
    "two islands": "models: {}\ndag: {a: [], b: []}\n",
    "an edge twice": "models: {}\ndag: {a: [b, b]}\n",
    "an empty dag": "models: {}\ndag: {}\n",
    "a dag of nothing": "models: {}\ndag:\n",
    "a dag that is a list": "models: {}\ndag: [a]\n",
    "a dag that is text": "models: {}\ndag: a\n",
    "no models": "dag: {a: [b]}\n",
    "models of nothing": "models:\ndag: {a: [b]}\n",
    "models that are a list": "models: []\ndag: {a: [b]}\n",
    "models that are text": "models: none\ndag: {a: [b]}\n",
    "children of nothing": "models: {}\ndag: {a: }\n",
    "children that are text": "models: {}\ndag: {a: b}\n",
    "children that are a mapping": "models: {}\ndag: {a: {b: c}}\n",
    "a number as a node": "models: {}\ndag: {1: [a]}\n",
    "true as a node": "models: {}\ndag: {on: [a]}\n",
    "a number as a child": "models: {}\ndag: {a: [1]}\n",
    "a list as a child": "models: {}\ndag: {a: [[b]]}\n",
    "no YAML": "models: {\ndag:\n",
    "two documents": "models: {}\ndag: {a: [b]}\n---\nx: 1\n",
    "a url that is missing": "models: {m: {batch-size: 2}}\ndag: {m: []}\n",
    "a url that is empty": "models: {m: {url: ''}}\ndag: {m: []}\n",
    "a url that is a number": "models: {m: {url: 5}}\ndag: {m: []}\n",
    "an archive that is not there": "models: {m: {url: nonesuch.mar}}\ndag: {m: []}\n",
    "an archive without its ending": "models: {m: {url: model1}}\ndag: {m: []}\n",
    "a path that leads up": "models: {m: {url: ../store/model1.mar}}\ndag: {m: []}\n",
    "a model of nothing": "models: {m: }\ndag: {a: []}\n",
    "a model that is text": "models: {m: model1.mar}\ndag: {m: []}\n",
    "a model that is a list": "models: {m: [model1.mar]}\ndag: {m: []}\n",
    "a number as a model": "models: {1: {url: model1.mar}}\ndag: {a: []}\n",
    "an unknown setting": "models: {bach-size: 3}\ndag: {a: []}\n",
    "batch size x": "models: {m: {url: model1.mar, batch-size: x}}\ndag: {m: []}\n",
    "batch size x of an unused model": "models: {m: {url: model1.mar, batch-size: x}}\ndag: {a: []}\n",
    "batch size x for all": "models: {batch-size: x}\ndag: {a: []}\n",
    "batch size '2'": "models: {m: {url: model1.mar, batch-size: '2'}}\ndag: {m: []}\n",
    "batch size 2.0": "models: {m: {url: model1.mar, batch-size: 2.0}}\ndag: {m: []}\n",
    "batch size true": "models: {m: {url: model1.mar, batch-size: true}}\ndag: {m: []}\n",
    "batch size of nothing": "models: {m: {url: model1.mar, batch-size: }}\ndag: {m: []}\n",
    "batch size 3000000000": "models: {m: {url: model1.mar, batch-size: 3000000000}}\ndag: {m: []}\n",
    "empty": "",
}
"""It refuses these when it reads them."""

REFUSED_BY_WORKERS = {
    "an unknown function": "models: {}\ndag: {a: [nonesuch]}\n",
    "a name with a space": "models: {}\ndag: {a: [' b']}\n",
    "no function": "models: {}\ndag: {constant: []}\n",
    "a class": "models: {}\ndag: {NotAFunction: []}\n",
    "a module": "models: {}\ndag: {json: []}\n",
    "no archive": "models: {m: {url: junk.mar}}\ndag: {m: []}\n",
}
"""It refuses these after a while, because no worker can be started."""

NEVER_ANSWERED = {
    "timeout 0": "models: {m: {url: model1.mar, timeout-ms: 0}}\ndag: {m: []}\n",
    "timeout -5": "models: {m: {url: model1.mar, timeout-ms: -5}}\ndag: {m: []}\n",
    "timeout -5 for all": "models: {timeout-ms: -5}\ndag: {a: []}\n",
    "no worker": "models: {m: {url: model1.mar, max-workers: 0}}\ndag: {m: []}\n",
    "workers -1": "models: {m: {url: model1.mar, max-workers: -1}}\ndag: {m: []}\n",
}
"""It registers these, and every call fails. Here they are refused."""

STRICTER = {
    "an address": f"models: {{m: {{url: 'file://{STORE}/model1.mar'}}}}\ndag: {{m: []}}\n",
    "a misspelt setting": "models: {m: {url: model1.mar, bach-size: 3}}\ndag: {m: []}\n",
    "a node twice": "models: {}\ndag: {a: [b], a: [c]}\n",
    "a model twice": "models: {m: {url: model1.mar}, m: {url: model2.mar}}\ndag: {m: []}\n",
    "a setting twice": "models: {batch-size: 2, batch-size: 3}\ndag: {a: []}\n",
    "a section twice": "models: {}\ndag: {a: [b]}\ndag: {a: [c]}\n",
}
"""It registers and answers these, by a copy of its own, or by taking no notice of a part. Here they are refused."""


def write_store(folder: Path) -> None:
    """The archives that the specifications name."""
    folder.mkdir()
    manifest = {"createdOn": "", "runtime": "python", "archiverVersion": "0.12.0"}
    for i in range(1, 5):
        name = f"model{i}"
        model = {"modelName": name, "handler": "handler.py", "modelVersion": "1.0"}
        with zipfile.ZipFile(folder / f"{name}.mar", "w") as archive:
            archive.writestr("handler.py", MODEL)
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps({**manifest, "model": model}))
    with zipfile.ZipFile(folder / "model1.mar") as archive:
        archive.extractall(folder / "folder")
    (folder / "junk.mar").write_bytes(b"junk")


def with_store(text: str, folder: Path) -> str:
    return text.replace(STORE, str(folder))
