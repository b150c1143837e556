"""OpenVINO GenAI: language models on a CPU."""
