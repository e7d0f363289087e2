//! What becomes of listening sockets when the files change.
//!
//! Owns: which go from one relay to another, and which relay listens elsewhere. Must not know: what a reload is.

use std::collections::BTreeMap;

use tracing::warn;

use super::{Changes, Fleet};
use crate::commands::run::plan::Spec;
use crate::model::{Endpoint, Protocol};
use crate::socket::unix::remove_socket_file;
use crate::systemd;

impl Fleet {
    /// An address that goes from one relay to another keeps its sockets. Others are not kept for a moment:
    /// what came to them after the relay has closed its own would be lost.
    pub(super) fn offer_sockets_of(&self, name: &str, changes: &mut Changes) {
        let Some(relay) = self.supervisor.borrow().task(name) else {
            return;
        };
        let specs = self.specs.borrow();
        let next_at = |protocol: Protocol, endpoint: &Endpoint| {
            let next = specs.values().map(|spec| &spec.instance);
            let mut next =
                next.filter(|next| next.options.protocol == protocol && next.listen.has(endpoint));
            next.next()
        };
        let listeners = match relay.server.listeners() {
            Ok(listeners) => listeners,
            Err(error) => {
                warn!(%error, instance = name, "cannot keep its listening sockets");
                return;
            }
        };
        let mut kept = BTreeMap::<(Protocol, Endpoint), usize>::new();
        for listener in listeners {
            let Ok((protocol, endpoint)) = listener.place() else {
                continue;
            };
            match next_at(protocol, &endpoint) {
                Some(_) => {
                    self.world.offer(listener);
                    *kept.entry((protocol, endpoint)).or_default() += 1;
                }
                None => remove_file(&endpoint),
            }
        }
        for ((protocol, endpoint), count) in kept {
            let next = next_at(protocol, &endpoint);
            if let Some(next) = next.filter(|next| count > self.world.listeners_of(next).get()) {
                changes.notes.push(format!(
                    "{}: keeps {count} listeners on {endpoint} until it is stopped and started: to close one could refuse a connection",
                    next.name
                ));
            }
        }
    }

    /// The ports that a relay gives up, where another one is to have them.
    pub(super) fn offer_ports_of(&self, name: &str) {
        let Some(relay) = self.supervisor.borrow().task(name) else {
            return;
        };
        let specs = self.specs.borrow();
        let others = || specs.iter().filter(|(other, _)| *other != name);
        for listener in relay.server.listeners().unwrap_or_default() {
            if let Ok((protocol, endpoint)) = listener.place()
                && others().any(|(_, Spec { instance, .. })| {
                    instance.options.protocol == protocol && instance.listen.has(&endpoint)
                })
            {
                self.world.offer(listener);
            }
        }
    }

    /// Has a relay listen at the ports of its new line. Where it cannot, another one is to be started there, as
    /// often as it takes.
    pub(super) fn relisten(&self, name: &str, changes: &mut Changes) {
        let Some(Spec { instance, .. }) = self.specs.borrow().get(name).cloned() else {
            return;
        };
        // where it does not run it is being started by its new line
        let Some(relay) = self.supervisor.borrow().task(name) else {
            return;
        };
        if let Err(error) = relay.listen_on(&self.world, &instance) {
            warn!(instance = name, "a new relay, without the flows: {error:#}");
            self.offer_sockets_of(name, changes);
            systemd::forget(name);
            self.keep(name);
        }
    }

    /// Says where a relay has another number of listeners than its new line wants.
    pub(super) fn note_kept_sockets(&self, name: &str, changes: &mut Changes) {
        if let Some(relay) = self.supervisor.borrow().task(name)
            && let Some(Spec { instance, .. }) = self.specs.borrow().get(name)
        {
            changes.notes.extend(relay.keeps_its_sockets(instance));
        }
    }

    /// Removes the files of Unix sockets at the process's end; not those that systemd keeps for the next one.
    pub(in crate::commands::run) fn remove_socket_files(&self) {
        if systemd::stores() {
            return;
        }
        let supervisor = self.supervisor.borrow();
        for (name, _) in self.statuses() {
            if let Some(relay) = supervisor.task(&name) {
                relay
                    .instance
                    .listen
                    .endpoints()
                    .for_each(|one| remove_file(&one));
            }
        }
    }
}

pub(super) fn remove_file(endpoint: &Endpoint) {
    if let Endpoint::Unix(path) = endpoint {
        remove_socket_file(path);
    }
}
