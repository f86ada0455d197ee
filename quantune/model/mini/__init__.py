"""`builtin:mini`: a small trained Llama-architecture causal LM that ships inside the package (see README.md)."""

from pathlib import Path

PATH: Path = Path(__file__).resolve().parent
