//! The UDP relay on the real kernel: senders of each kind, a service that records who asks.

mod cells;
mod decoders;
pub(crate) mod dns;
mod every;
mod first;
pub(crate) mod lab;
pub(crate) mod laws;
mod lending;
mod limits;
mod mtu;
mod owes;
mod packets;
#[cfg(feature = "soak")]
mod quic;
mod reload;
mod run;
mod spp;
mod view;
mod workers;
