mod decoder;
mod reference;
mod room;
