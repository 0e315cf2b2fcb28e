"""Requests in, tokens out: tokenizer, pipeline, engine."""
