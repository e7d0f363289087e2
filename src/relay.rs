//! Header → spoofed connection → copy both ways.

pub mod header;
