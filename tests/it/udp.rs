//! The UDP relay on the real kernel: senders of each kind, a service that records who asks.

mod every;
mod dns;
mod first;
mod lab;
mod limits;
mod owes;
mod packets;
mod spp;
mod workers;
