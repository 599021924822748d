"""Requests to vLLM servers over HTTP."""
