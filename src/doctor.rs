//! The doctor: proves each pathway with a spoofed connection, and names the fault and its fix.
//!
//! | file | owns |
//! |---|---|
//! | [`gather`] | the order of looks and probes |
//! | [`probe`], `conntrack` | connections, and what the kernel remembers of them |
//! | [`host`], [`listeners`], [`filters`] | the host: switches, sockets, firewalls |
//! | [`evidence`] | all that was seen, as plain data |
//! | [`verdict`] | from evidence to diagnoses; pure |
//! | [`fault`] | every fault that has a name |
//!
//! Must not know: how instances were configured, who asks, how a diagnosis is shown. Changes nothing.

mod conntrack;
pub mod evidence;
pub mod fault;
pub mod filters;
pub mod gather;
pub mod host;
pub mod listeners;
pub mod probe;
pub mod verdict;

use serde::Serialize;

pub use evidence::Evidence;
pub use fault::{Diagnosis, Fault, Fix, Severity};
pub use gather::{Asked, Asker};

/// What was found, and what it was found from.
#[derive(Debug, Clone, Serialize)]
pub struct Examination {
    /// Whether no fault was found. Notes do not count.
    pub healthy: bool,
    /// Faults, the likeliest cause first, then notes.
    pub diagnoses: Vec<Diagnosis>,
    /// All that was seen.
    pub evidence: Evidence,
}

/// Looks at these instances, probes their targets and judges. Blocking, under three seconds.
///
/// # Errors
/// When no event loop can be had.
pub fn examine(asked: &[Asked], asker: &Asker) -> std::io::Result<Examination> {
    let evidence = gather::gather(asked, asker)?;
    let diagnoses = verdict::judge(&evidence);
    Ok(Examination {
        healthy: diagnoses.iter().all(|one| one.severity != Severity::Fault),
        diagnoses,
        evidence,
    })
}
