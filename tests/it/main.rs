//! Everything that is shown on the real kernel and with real programs, as one test binary.
//!
//! Kernel work runs in network namespaces of the test's own (`support::net`), checked with other
//! programs (`ip`, `iptables-save`, `conntrack`, the service's own log). A test that lacks root or a
//! program fails and says what to install.

mod chain;
mod compat;
mod config;
mod demo;
mod doctor;
mod edge;
mod header;
mod import;
mod listen;
mod manual;
mod narrow;
mod packages;
mod pathway;
mod probe;
mod relay;
#[cfg(feature = "soak")]
mod soak;
mod succession;
mod supervisor;
#[cfg(feature = "soak")]
mod supervisor_soak;
mod supervisor_systemd;
mod support;
mod systemd;
mod targets;
mod transparent;
mod udp;
mod view;
