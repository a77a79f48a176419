//! The engine's numbers against an independent implementation: PyTorch's, with transformers and PEFT (values in this folder).

mod model;
