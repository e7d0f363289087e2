//! The relay on the real kernel: real sockets between namespaces, a service that records who it sees.

mod faults;
mod header;
pub(crate) mod lab;
mod limits;
mod owes;
mod ports;
mod run;
mod setup;
mod spread;
mod stress;
mod together;
mod transfer;
