//! How often a line is said, and which were said last.
//!
//! Owns: the allowance of each kind of line and address. Must not know: what a line says.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tracing::field::display;
use tracing::{debug, warn};

use crate::model::{ClientAddr, Endpoint, ProxyAddr};
use crate::relay::counters::{ConnectFailure, Refusal};
use crate::relay::udp::counters::Dropped;
use crate::socket::stream::StreamListener;

/// The time in which a subject may use up its lines.
pub(in crate::relay) const WINDOW: Duration = Duration::from_secs(10);
/// How many lines of one kind about one address are said in that time.
const BURST: u32 = 5;
/// How many kinds and addresses are told apart; beyond that they share one allowance per kind.
const MAX_SUBJECTS: usize = 1024;
/// How many lines are kept for whoever asks what went wrong.
const MAX_RECENT: usize = 64;

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::relay) enum Subject {
    Refused(Refusal),
    ConnectFailed(ConnectFailure),
    AcceptPaused,
    /// A datagram.
    Dropped(Dropped),
    /// Flows that got no answer.
    Unanswered,
}

impl Subject {
    /// The name in reports, that of the counter where it has one.
    fn name(self) -> &'static str {
        match self {
            Self::Refused(kind) => kind.name(),
            Self::ConnectFailed(kind) => kind.name(),
            Self::AcceptPaused => "accept-paused",
            Self::Dropped(kind) => kind.name(),
            Self::Unanswered => "unanswered",
        }
    }
}

/// What was last said about a relay's connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// Seconds since 1970.
    pub at: u64,
    /// The proxy's address.
    pub proxy: ProxyAddr,
    /// The client's, where it was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<SocketAddr>,
    /// What went wrong.
    pub message: String,
    /// Which kind of error it is, as the counters name them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
}

/// Decides which warnings are said; the rest is said at debug level. One for all workers: nothing
/// that is relayed ever comes here, so the lock costs nothing.
#[derive(Debug, Default)]
pub(in crate::relay) struct Limiter {
    windows: Mutex<HashMap<Key, Window>>,
    /// The last line of each kind about each proxy, the newest last.
    recent: Mutex<Vec<LastError>>,
}

/// A kind of line, and the address it is about; none when there are too many to tell apart.
pub(in crate::relay) type Key = (Subject, Option<IpAddr>);

#[derive(Debug)]
struct Window {
    since: Instant,
    said: u32,
    held_back: u64,
}

/// What becomes of a warning.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::relay) enum Admission {
    /// Say it, and that so many like it were not said.
    Say(u64),
    /// Hold it back; for the first of a window, [`Limiter::settle`] this key when the window is over.
    HoldBack(Option<Key>),
}

/// What became of a line.
#[derive(Debug)]
pub(in crate::relay) enum Said {
    /// It was said, and is the last error.
    Warned(LastError),
    /// It was held back; for the first of a window, [`Limiter::settle`] this key when the window is over.
    HeldBack(Option<Key>),
}

impl Limiter {
    pub(in crate::relay) fn admit(
        &self,
        subject: Subject,
        about: IpAddr,
        now: Instant,
    ) -> Admission {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (subject, Some(about));
        if windows.len() >= MAX_SUBJECTS && !windows.contains_key(&key) {
            windows.retain(|_, window| {
                now.duration_since(window.since) < WINDOW || window.held_back > 0
            });
            if windows.len() >= MAX_SUBJECTS {
                key = (subject, None);
            }
        }
        let window = windows.entry(key).or_insert(Window {
            since: now,
            said: 0,
            held_back: 0,
        });
        if now.duration_since(window.since) >= WINDOW {
            (window.since, window.said) = (now, 0);
        }
        if window.said >= BURST {
            window.held_back += 1;
            return Admission::HoldBack((window.held_back == 1).then_some(key));
        }
        window.said += 1;
        Admission::Say(std::mem::take(&mut window.held_back))
    }

    /// One line about a peer, as a warning unless there were too many like it.
    pub(in crate::relay) fn say(
        &self,
        subject: Subject,
        (proxy, client): (ProxyAddr, Option<ClientAddr>),
        message: &dyn fmt::Display,
    ) -> Said {
        let (proxy_addr, client_addr) = (display(proxy), client.map(display));
        match self.admit(subject, proxy.ip(), Instant::now()) {
            Admission::Say(more) => {
                warn!(
                    proxy.addr = proxy_addr,
                    client.addr = client_addr,
                    "{message}{}",
                    AndMore(more)
                );
                let error = LastError {
                    at: SystemTime::now()
                        .duration_since(UNIX_EPOCH)
                        .map_or(0, |since| since.as_secs()),
                    proxy,
                    client: client.map(ClientAddr::get),
                    message: message.to_string(),
                    kind: subject.name().to_owned(),
                };
                self.keep(error.clone());
                Said::Warned(error)
            }
            Admission::HoldBack(first) => {
                debug!(
                    proxy.addr = proxy_addr,
                    client.addr = client_addr,
                    "{message}"
                );
                Said::HeldBack(first)
            }
        }
    }

    /// Keeps what was said, in the place of an older line of the same kind about the same proxy.
    fn keep(&self, error: LastError) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.retain(|old| old.kind != error.kind || old.proxy.ip() != error.proxy.ip());
        if recent.len() >= MAX_RECENT {
            recent.remove(0);
        }
        recent.push(error);
    }

    /// The last line of each kind about each proxy, the newest last.
    pub(in crate::relay) fn recent(&self) -> Vec<LastError> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.clone()
    }

    /// Says how many were held back even if none like them follows; to be called [`WINDOW`] after the first.
    pub(in crate::relay) fn settle(&self, key: Key, proxy: ProxyAddr, message: &str) {
        let more = self.held_back(key);
        if more > 0 {
            warn!(proxy.ip = %proxy.ip(), "and {more} more like it: {message}");
        }
    }

    /// How many were held back and not mentioned since; they are as good as mentioned by this.
    fn held_back(&self, key: Key) -> u64 {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows
            .get_mut(&key)
            .map_or(0, |window| std::mem::take(&mut window.held_back))
    }

    /// One line about a listener that cannot accept for now.
    pub(in crate::relay) fn warn_about_listener(
        &self,
        listener: &StreamListener,
        message: &dyn fmt::Display,
    ) {
        let endpoint = listener.endpoint().ok();
        let about = match &endpoint {
            Some(Endpoint::Inet(addr) | Endpoint::Transparent(addr)) => addr.ip(),
            _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        let listen = endpoint.map(display);
        if let Admission::Say(more) = self.admit(Subject::AcceptPaused, about, Instant::now()) {
            warn!(listen, "{message}{}", AndMore(more));
        }
    }
}

/// " (and 412 more like it)", or nothing.
struct AndMore(u64);

impl fmt::Display for AndMore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            more => write!(f, " (and {more} more like it)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_said_and_the_rest_is_counted() {
        let limiter = Limiter::default();
        let subject = Subject::Refused(Refusal::NoHeader);
        let (one, other) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limiter.admit(subject, one, start), Admission::Say(0));
        }
        let key = (subject, Some(one));
        assert_eq!(
            limiter.admit(subject, one, start),
            Admission::HoldBack(Some(key))
        );
        assert_eq!(
            limiter.admit(subject, one, start),
            Admission::HoldBack(None)
        );
        assert_eq!(limiter.admit(subject, other, start), Admission::Say(0));
        let later = start + WINDOW;
        assert_eq!(limiter.admit(subject, one, later), Admission::Say(2));
        assert_eq!(limiter.admit(subject, one, later), Admission::Say(0));
        assert_eq!(limiter.held_back(key), 0);
        for _ in 2..BURST {
            limiter.admit(subject, one, later);
        }
        assert_eq!(
            limiter.admit(subject, one, later),
            Admission::HoldBack(Some(key))
        );
        assert_eq!(limiter.held_back(key), 1);
        assert_eq!(AndMore(412).to_string(), " (and 412 more like it)");
    }

    #[test]
    fn a_flood_of_addresses_is_bounded() {
        let limiter = Limiter::default();
        let subject = Subject::Refused(Refusal::ProxyNotAllowed);
        let start = Instant::now();
        let said = (0..10_000u32)
            .filter(|n| {
                let about = IpAddr::V4(n.to_be_bytes().into());
                limiter.admit(subject, about, start) == Admission::Say(0)
            })
            .count();
        assert_eq!(said, MAX_SUBJECTS + BURST as usize);
        assert!(limiter.windows.lock().unwrap().len() <= MAX_SUBJECTS + 1);
    }
}
