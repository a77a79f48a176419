//! The umbrella error over the rooms' own.
