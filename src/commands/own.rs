//! What this host has that a transparent listener could take: its addresses, and who listens.

use crate::config::Own;
use crate::doctor::{host, listeners};
use crate::model::Protocol;

/// Looks, as far as this user may: what is not seen is not warned of.
pub(super) fn look() -> Own {
    let sockets = listeners::listening(Protocol::Tcp).unwrap_or_default();
    let services = listeners::with_processes(&sockets).into_iter().map(|one| {
        let name = one.process.map_or_else(
            || "a service".to_owned(),
            |process| format!("{} (pid {})", process.name, process.pid),
        );
        (one.address, name)
    });
    Own {
        addresses: host::addresses(),
        services: services.collect(),
    }
}
