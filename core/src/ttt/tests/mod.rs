pub(crate) mod decoder;
mod reference;
mod room;
