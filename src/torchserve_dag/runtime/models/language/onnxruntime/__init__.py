"""ONNX Runtime GenAI, and the export of models for it."""
