"""Any server of OpenAI's API."""
