//! Called as `go-mmproxy` or `mmproxy`: what people run today works with nothing but the program swapped.

mod alone;
mod exits;
mod json;
pub(crate) mod lab;
mod link;
mod readmes;
mod scripts;
mod units;
