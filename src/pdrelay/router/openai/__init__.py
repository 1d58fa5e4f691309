"""OpenAI's API: requests read and checked, answers written, streamed or whole."""
