//! Called as `go-mmproxy` or `mmproxy`: what people run today works with nothing but the program swapped.

mod alone;
mod exits;
mod json;
pub(crate) mod lab;
mod link;
mod migrating;
mod page;
mod readmes;
mod scripts;
