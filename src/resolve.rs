//! Targets that are names: their addresses, looked up again and again, the last good ones kept.
//!
//! Owns: asking the system's resolver and the container engine, and when to ask again. Must not know: relays,
//! pathways, files.
//!
//! The system's resolver does not tell how long an answer holds, so names of hosts are looked up at an interval.
//! Names of containers are looked up when the engine tells of an event, and at the interval in case its stream
//! of events broke unseen.

pub mod engine;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use self::engine::{Engine, Events};
use crate::causes::with_causes;
use crate::model::{Answers, Family, TargetName};

/// How long the system's resolver may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it is quiet before containers are looked at again: a restart is half a dozen events.
const QUIET: Duration = Duration::from_millis(100);
/// How long until an engine that was gone is tried again, at first; twice as long each time.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How many earlier addresses of a name are remembered: connections to them may be open for days.
const REMEMBERED: usize = 16;

/// A name and the family its address is wanted in.
pub type Key = (TargetName, Family);

/// The names of a process and their addresses.
#[derive(Debug, Default)]
pub struct Resolver {
    wanted: RefCell<BTreeSet<Key>>,
    answers: RefCell<Answers>,
    /// What was last said about those that have no answer now.
    failing: RefCell<BTreeMap<Key, String>>,
    interval: Cell<Option<Duration>>,
    changed: Notify,
}

impl Resolver {
    /// How often names are looked up again unless it is said otherwise.
    pub const INTERVAL: Duration = Duration::from_secs(30);

    /// From here on these names are wanted, and looked up this often. Others are forgotten.
    pub fn want(&self, wanted: BTreeSet<Key>, interval: Duration) {
        self.answers
            .borrow_mut()
            .0
            .retain(|key, _| wanted.contains(key));
        self.failing
            .borrow_mut()
            .retain(|key, _| wanted.contains(key));
        if *self.wanted.borrow() != wanted || self.interval.get() != Some(interval) {
            self.wanted.replace(wanted);
            self.interval.set(Some(interval));
            self.changed.notify_waiters();
        }
    }

    /// The addresses as they are known now.
    pub fn answers(&self) -> Answers {
        self.answers.borrow().clone()
    }

    /// Why names have no address, or only an old one.
    pub fn failing(&self) -> BTreeMap<Key, String> {
        self.failing.borrow().clone()
    }

    /// Looks up what has never been looked up with success; whether there is anything new.
    pub async fn look_at_new(&self) -> bool {
        let known = self.answers();
        let mut new = self.wanted.borrow().clone();
        new.retain(|(name, family)| known.of(name, *family).is_none());
        self.look(new).await
    }

    /// Waits until an address is another, looking when it is time to. Cancel-safe: what was learnt is kept, and
    /// told when asked for next.
    pub async fn changed(&self) {
        loop {
            let wanted = self.wanted.borrow().clone();
            let other = self.changed.notified();
            if wanted.is_empty() {
                other.await;
                continue;
            }
            tokio::select! {
                () = self.change_of(&wanted) => return,
                () = other => {}
            }
        }
    }

    async fn change_of(&self, wanted: &BTreeSet<Key>) {
        let has_containers = wanted
            .iter()
            .any(|(name, _)| matches!(name, TargetName::Container { .. }));
        let interval = self.interval.get().unwrap_or(Self::INTERVAL);
        let at_times = async {
            loop {
                sleep(interval).await;
                if self.look(wanted.clone()).await {
                    return;
                }
            }
        };
        if has_containers {
            tokio::select! {
                () = at_times => {}
                () = self.follow_engine(wanted) => {}
            }
        } else {
            at_times.await;
        }
    }

    /// Looks after each event, and after each time the stream of events is there again.
    async fn follow_engine(&self, wanted: &BTreeSet<Key>) {
        let containers: BTreeSet<Key> = wanted
            .iter()
            .filter(|(name, _)| matches!(name, TargetName::Container { .. }))
            .cloned()
            .collect();
        let mut pause = FIRST_RETRY;
        loop {
            match listen().await {
                Ok(mut events) => {
                    pause = FIRST_RETRY;
                    loop {
                        // also what happened before the stream was there
                        if self.look(containers.clone()).await {
                            return;
                        }
                        if events.next().await.is_none() {
                            break;
                        }
                        while let Ok(Some(())) = timeout(QUIET, events.next()).await {}
                    }
                    debug!("the container engine's events ended");
                }
                Err(error) => debug!(
                    error = &error as &dyn std::error::Error,
                    "no events of the container engine"
                ),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }

    /// Looks names up; whether an address to use is another now.
    async fn look(&self, names: BTreeSet<Key>) -> bool {
        let asked = names.into_iter().map(|key| async {
            let found = addresses(&key.0, key.1).await;
            (key, found)
        });
        let mut changed = false;
        for (key, found) in join_all(asked).await {
            if self.wanted.borrow().contains(&key) {
                changed |= self.note(key, found);
            }
        }
        changed
    }

    /// Notes an answer; a failure leaves the last good one.
    fn note(&self, key: Key, found: Result<Vec<IpAddr>, String>) -> bool {
        let (name, family) = &key;
        let mut answers = self.answers.borrow_mut();
        let mut failing = self.failing.borrow_mut();
        let known = answers.0.get(&key).cloned().unwrap_or_default();
        let found = match found {
            Ok(found) => found,
            Err(why) => {
                if failing.get(&key) != Some(&why) {
                    match known.first() {
                        Some(last) => {
                            warn!(%name, %family, %last, "the last address is kept: {why}")
                        }
                        None => warn!(%name, %family, "no address: {why}"),
                    }
                    failing.insert(key, why);
                }
                return false;
            }
        };
        failing.remove(&key);
        // a name with several addresses keeps the one it has, whatever their order
        if known.first().is_some_and(|addr| found.contains(addr)) {
            return false;
        }
        let Some(&addr) = found.first() else {
            return false;
        };
        info!(%name, %family, %addr, before = known.first().map(tracing::field::display), "resolved");
        let mut all = vec![addr];
        all.extend(known.into_iter().filter(|one| *one != addr));
        all.truncate(1 + REMEMBERED);
        answers.0.insert(key, all);
        true
    }
}

/// Looks names up once.
pub async fn once(wanted: BTreeSet<Key>) -> (Answers, BTreeMap<Key, String>) {
    let resolver = Resolver::default();
    resolver.want(wanted, Resolver::INTERVAL);
    resolver.look_at_new().await;
    (resolver.answers(), resolver.failing())
}

async fn listen() -> Result<Events, engine::Error> {
    Engine::find()?.events().await
}

/// The addresses of a name, the smallest first; at least one.
async fn addresses(name: &TargetName, family: Family) -> Result<Vec<IpAddr>, String> {
    match name {
        TargetName::Container { name, network } => {
            let engine = Engine::find().map_err(|error| error.to_string())?;
            let found = engine.address(name, network.as_deref(), family).await;
            match found {
                Ok(addr) => Ok(vec![addr]),
                Err(error) => Err(with_causes(&error)),
            }
        }
        TargetName::Host(name) => {
            let looked_up = timeout(PATIENCE, tokio::net::lookup_host((name.as_str(), 0)))
                .await
                .map_err(|_elapsed| format!("the resolver took longer than {PATIENCE:?}"))?
                .map_err(|error| error.to_string())?;
            let found = looked_up.map(|addr| addr.ip());
            let found: BTreeSet<IpAddr> = found
                .filter(|addr| Family::of(*addr) == family && is_usable(*addr))
                .collect();
            if found.is_empty() {
                return Err(format!(
                    "the name has no {family} address that can be a target"
                ));
            }
            Ok(found.into_iter().collect())
        }
    }
}

/// What no service can be reached at is no answer, as it is none in the file.
fn is_usable(addr: IpAddr) -> bool {
    let local = match addr {
        IpAddr::V4(v4) => v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    !local && !addr.is_unspecified() && !addr.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        ("db".parse().unwrap(), Family::V4)
    }

    fn found(addrs: &[&str]) -> Result<Vec<IpAddr>, String> {
        Ok(addrs.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn the_last_good_answer_is_kept() {
        let resolver = Resolver::default();
        resolver.want(BTreeSet::from([key()]), Resolver::INTERVAL);
        assert!(!resolver.note(key(), Err("no such name".to_owned())));
        assert_eq!(resolver.answers().of(&key().0, Family::V4), None);
        assert!(resolver.note(key(), found(&["10.0.0.1", "10.0.0.2"])));
        let used = || {
            resolver
                .answers()
                .of(&key().0, Family::V4)
                .unwrap()
                .to_string()
        };
        assert_eq!(used(), "10.0.0.1");
        assert!(resolver.failing().is_empty());
        // the order of several is no change, an address that is gone is
        assert!(!resolver.note(key(), found(&["10.0.0.0", "10.0.0.1"])));
        assert!(!resolver.note(key(), Err("no such name".to_owned())));
        assert_eq!(used(), "10.0.0.1");
        assert!(resolver.note(key(), found(&["10.0.0.2"])));
        assert_eq!(used(), "10.0.0.2");
        let all = resolver.answers().all(&key().0, Family::V4).to_vec();
        assert_eq!(Ok(all), found(&["10.0.0.2", "10.0.0.1"]));
        // what is wanted no more is forgotten
        resolver.want(BTreeSet::new(), Resolver::INTERVAL);
        assert_eq!(resolver.answers(), Answers::default());
    }
}
