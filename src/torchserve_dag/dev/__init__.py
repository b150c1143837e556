"""Dev mode: a project's folder served as it stands, and again whenever a file is saved.

loader.py    which workflows and handlers the folder has now, loaded; what has not changed stays loaded
models.py    the handlers that stay loaded, by the content of their code, their modules and their weights
server.py    serves what is loaded, looks for saved files, and says what it sees
"""
