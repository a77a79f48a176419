//! The engine's numbers against independent implementations: PyTorch's (values in this folder) and candle-transformers' Llama.

mod model;
