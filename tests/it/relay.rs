//! The relay on the real kernel: real sockets between namespaces, a service that records who it sees.

mod header;
pub(crate) mod lab;
mod limits;
mod owes;
mod run;
mod transfer;
