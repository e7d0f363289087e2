//! A deployment in miniature: hosts as network namespaces of this process, and the programs on them.
//!
//! Owns: private namespaces, cables between them, a proxy that sends PROXY headers, a service that tells
//! its clients what it sees; a host with one of everything, and the ways to break it (`clinic`). Must not know: pathways, relays, what is shown of it.

pub mod clinic;
pub mod namespace;
pub mod programs;
