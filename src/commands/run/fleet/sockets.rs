//! What becomes of listening sockets when the files change.
//!
//! Owns: which go from one relay to another, and which relay listens elsewhere. Must not know: what a reload is.

use std::collections::BTreeMap;

use tracing::warn;

use super::{Changes, Fleet};
use crate::commands::run::plan::{Spec, Specs};
use crate::model::{Endpoint, Instance};
use crate::socket::listening::{Listening, Place};
use crate::socket::unix::remove_socket_file;
use crate::systemd;

impl Fleet {
    /// An address that goes from one relay to another keeps its sockets. Others are not kept for a moment:
    /// what came to them after the relay has closed its own would be lost.
    pub(super) fn offer_sockets_of(&self, name: &str, changes: &mut Changes) {
        let specs = self.specs.borrow();
        let mut kept = BTreeMap::<Place, usize>::new();
        for (place, listener) in self.sockets_of(name) {
            match next_at(&specs, &place) {
                Some(_) => {
                    self.world.offer(listener);
                    *kept.entry(place).or_default() += 1;
                }
                None => remove_file(&place.1),
            }
        }
        for (place, count) in kept {
            let (next, (_, endpoint)) = (next_at(&specs, &place), &place);
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
        let specs = self.specs.borrow();
        for (place, listener) in self.sockets_of(name) {
            if next_at(&specs, &place).is_some_and(|next| next.name.as_str() != name) {
                self.world.offer(listener);
            }
        }
    }

    /// The listening sockets of a relay that runs, once more, each with its place.
    fn sockets_of(&self, name: &str) -> Vec<(Place, Listening)> {
        let Some(relay) = self.supervisor.borrow().task(name) else {
            return Vec::new();
        };
        let listeners = relay.server.listeners().unwrap_or_else(|error| {
            warn!(%error, instance = name, "cannot keep its listening sockets");
            Vec::new()
        });
        let listeners = listeners.into_iter();
        listeners
            .filter_map(|one| Some((one.place().ok()?, one)))
            .collect()
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

/// The instance that is to listen at a place.
fn next_at<'s>(specs: &'s Specs, (protocol, endpoint): &Place) -> Option<&'s Instance> {
    let mut instances = specs.values().map(|spec| &spec.instance);
    instances.find(|one| one.options.protocol == *protocol && one.listen.has(endpoint))
}

pub(super) fn remove_file(endpoint: &Endpoint) {
    if let Endpoint::Unix(path) = endpoint {
        remove_socket_file(path);
    }
}
