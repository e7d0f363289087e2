//! The UDP relay on the real kernel: senders of each kind, a service that records who asks.

mod cells;
mod dns;
mod every;
mod first;
pub(crate) mod lab;
mod limits;
mod owes;
mod packets;
mod run;
mod spp;
mod workers;
