//! Header → spoofed connection → copy both ways.
//!
//! A few worker threads ([`workers::Workers`]), each with a single-threaded runtime, host every relay of
//! the process; a relay has its own `SO_REUSEPORT` listener on each, and a connection lives and dies on one
//! thread. The caller binds the sockets and says when to stop ([`tcp::Server`]); [`settings::Settings`] is all
//! a relay is told; [`counters`] are what it tells unasked, [`view`] what it can be asked.
//!
//! One connection: `worker` (accept, limits) → `setup` (allowed proxy? [`header`], `client`, spoofed
//! connect) → `copy` (both ways, half-close, resets; small pieces of many connections together in its
//! `ring`) and `splice` (bulk).

mod batch;
mod client;
mod copy;
pub mod counters;
pub mod header;
pub mod histogram;
pub mod ports;
mod registry;
pub mod report;
pub mod server;
pub mod settings;
mod setup;
mod splice;
pub mod spp;
mod spread;
pub mod tcp;
pub mod udp;
pub mod view;
mod worker;
pub mod workers;
