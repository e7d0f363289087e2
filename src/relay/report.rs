//! What is said about connections that were not relayed, and how often: a proxy that is misconfigured
//! makes thousands of the same line.
//!
//! Owns: the rate of warnings and the words for what went wrong. Must not know: sockets in flight.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tracing::{debug, warn};

use super::counters::{ConnectFailure, Refusal};
use super::header::{self, HeaderError};
use super::settings::Settings;
use super::udp::counters::Dropped;
use crate::model::{Family, Mark, ProxyAddr, TargetAddr};
use crate::socket::udp::{Bound, udp_bound};
use crate::socket::{Failure, SpoofError};

/// The time in which a subject may use up its lines.
const WINDOW: Duration = Duration::from_secs(10);
/// How many lines of one kind about one address are said in that time.
const BURST: u32 = 5;
/// How many kinds and addresses are told apart; beyond that they share one allowance per kind.
const MAX_SUBJECTS: usize = 1024;

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    Refused(Refusal),
    ConnectFailed(ConnectFailure),
    AcceptPaused,
    /// A datagram.
    Dropped(Dropped),
    /// Flows that got no answer.
    Unanswered,
}

/// Decides which warnings are said; the rest is said at debug level. One for all workers: nothing
/// that is relayed ever comes here, so the lock costs nothing.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    windows: Mutex<HashMap<(Subject, Option<IpAddr>), Window>>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    said: u32,
    held_back: u64,
}

impl Limiter {
    /// `Some(n)`: say it, and that `n` like it were not said since the last. `None`: hold it back.
    pub(super) fn admit(&self, subject: Subject, about: IpAddr, now: Instant) -> Option<u64> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (subject, Some(about));
        if windows.len() >= MAX_SUBJECTS && !windows.contains_key(&key) {
            windows.retain(|_, window| now.duration_since(window.since) < WINDOW);
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
            return None;
        }
        window.said += 1;
        Some(std::mem::take(&mut window.held_back))
    }

    /// One line about a listener that cannot accept for now.
    pub(super) fn warn_about_listener(
        &self,
        listener: &tokio::net::TcpListener,
        message: &dyn fmt::Display,
    ) {
        let addr = listener.local_addr().ok();
        let about = addr.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |addr| addr.ip());
        let listen = addr.map(tracing::field::display);
        if let Some(more) = self.admit(Subject::AcceptPaused, about, Instant::now()) {
            let held_back = (more > 0).then_some(more);
            warn!(listen, held_back, "{message}");
        }
    }

    /// One line about a connection, as a warning unless there were too many like it.
    pub(super) fn warn(
        &self,
        subject: Subject,
        proxy: ProxyAddr,
        client: Option<&dyn fmt::Display>,
        message: &dyn fmt::Display,
    ) {
        let proxy_addr = tracing::field::display(proxy);
        let client_addr = client.map(tracing::field::display);
        match self.admit(subject, proxy.ip(), Instant::now()) {
            Some(0) => warn!(
                proxy.addr = proxy_addr,
                client.addr = client_addr,
                "{message}"
            ),
            Some(more) => warn!(
                proxy.addr = proxy_addr,
                client.addr = client_addr,
                held_back = more,
                "{message}"
            ),
            None => debug!(
                proxy.addr = proxy_addr,
                client.addr = client_addr,
                "{message}"
            ),
        }
    }
}

/// Bytes that are no header: what is wrong, and what they look like.
pub(super) fn bad_header(error: HeaderError, bytes: &[u8]) -> String {
    if error != HeaderError::NotProxy {
        return format!("refused: {error}");
    }
    let what = match header::looks_like(bytes) {
        Some(protocol) => format!("this is {protocol}"),
        None => format!("this begins with {}", Begins(bytes)),
    };
    format!(
        "refused: {what}: the proxy sends no PROXY header: add send-proxy (HAProxy) or proxy_protocol on (nginx) there"
    )
}

/// A datagram that begins no header: what it looks like.
pub(super) fn no_header_in_datagram(bytes: &[u8]) -> String {
    const HINT: &str = "does the proxy send a header on every datagram, or on the first of a flow only? set \
                        udp-header= as it does";
    match header::looks_like(bytes) {
        Some(protocol) => format!("refused: no PROXY header but {protocol}: {HINT}"),
        None => format!("refused: no PROXY header but {}: {HINT}", Begins(bytes)),
    }
}

/// A flow that ended idle and that the service never answered.
pub(super) fn unanswered(target: TargetAddr, mark: Mark) -> String {
    let wildcard = match udp_bound(target) {
        Ok(Bound::Wildcard) => {
            "; it is bound to the wildcard address and may answer from another one: bind it to the target"
        }
        _ => "",
    };
    format!("no answer from {target}{wildcard}: {}", pathway_hint(mark))
}

/// The first bytes of something unknown, quoted.
struct Begins<'a>(&'a [u8]);

impl fmt::Display for Begins<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 16;
        let shown = &self.0[..self.0.len().min(SHOWN)];
        write!(f, "\"{}\"", shown.escape_ascii())
    }
}

/// No complete header in time; a silent peer is a case of its own.
pub(super) fn header_timeout(received: &[u8], limit: Duration) -> String {
    if received.is_empty() {
        return format!(
            "refused: not a byte of a PROXY header within {limit:?}: a balancer that sends the header \
             with the client's first payload only (AWS NLB) cannot serve protocols in which the server \
             speaks first"
        );
    }
    format!(
        "refused: no complete PROXY header within {limit:?}, only {} bytes of one: {}",
        received.len(),
        Begins(received)
    )
}

/// Why a client address is refused.
pub(super) fn refused_client(refusal: Refusal, family: Family) -> String {
    match refusal {
        Refusal::ClientUnspecified => "refused: the client address is unspecified",
        Refusal::ClientLoopback => {
            "refused: the client address is loopback, which services trust and no remote client has"
        }
        Refusal::ClientMulticast => "refused: the client address is multicast",
        Refusal::ClientBroadcast => "refused: the client address is a broadcast address",
        Refusal::ClientLinkLocal => {
            "refused: the client address is link-local, which means nothing without its interface"
        }
        Refusal::FamilyNotServed => {
            return format!("refused: the instance has no {family} target for this client");
        }
        other => return format!("refused: {}", other.name()),
    }
    .to_owned()
}

/// A connection to the service that was not to be.
#[derive(Debug)]
pub(super) struct ConnectError {
    pub(super) kind: ConnectFailure,
    cause: Cause,
}

#[derive(Debug)]
enum Cause {
    TimedOut(Duration),
    Kernel(&'static str, io::Error),
    Spoof(SpoofError),
}

impl ConnectError {
    /// No answer within the connect timeout.
    pub(super) fn timed_out(limit: Duration) -> Self {
        Self {
            kind: ConnectFailure::TimedOut,
            cause: Cause::TimedOut(limit),
        }
    }

    /// What the kernel said about the connection.
    pub(super) fn kernel(operation: &'static str, error: io::Error) -> Self {
        Self {
            kind: kind_of(&error),
            cause: Cause::Kernel(operation, error),
        }
    }

    /// What became of the attempt to spoof; `Err` where the client's address is what is wrong.
    pub(super) fn spoof(error: SpoofError) -> Result<Self, Refusal> {
        match error {
            SpoofError::Broadcast(_) => Err(Refusal::ClientBroadcast),
            SpoofError::Failed(Failure { operation, source }) => {
                Ok(Self::kernel(operation, source))
            }
            error @ SpoofError::SourceReplaced { .. } => Ok(Self {
                kind: ConnectFailure::SourceReplaced,
                cause: Cause::Spoof(error),
            }),
        }
    }

    /// Whether descriptors or memory ran out.
    pub(super) fn is_exhausted(&self) -> bool {
        self.kind == ConnectFailure::NoDescriptors
    }

    /// The line about it, with the likely cause.
    pub(super) fn message(&self, target: TargetAddr, settings: &Settings) -> String {
        let mark = settings.mark;
        match (&self.cause, self.kind) {
            (Cause::TimedOut(limit), _) => format!(
                "no answer from {target} within {limit:?}: {}",
                pathway_hint(mark)
            ),
            (_, ConnectFailure::ServiceDown) => {
                format!("the service at {target} is down: connection refused")
            }
            (Cause::Kernel(_, error), ConnectFailure::TimedOut) => {
                format!("no answer from {target}: {error}: {}", pathway_hint(mark))
            }
            (Cause::Kernel(operation, error), ConnectFailure::NoRoute) => format!(
                "cannot {operation} to {target}: {error}: no route for this client and target: {}",
                pathway_hint(mark)
            ),
            (Cause::Kernel(operation, error), ConnectFailure::NotPermitted) => format!(
                "cannot {operation} for {target}: {error}: CAP_NET_ADMIN is missing, or a firewall rejects"
            ),
            (Cause::Kernel(operation, error), ConnectFailure::NoPort) => format!(
                "cannot {operation} for {target}: {error}: every port of the client's address is taken"
            ),
            (Cause::Kernel(operation, error), ConnectFailure::NoDescriptors) => format!(
                "cannot {operation} for {target}: {error}: raise LimitNOFILE or lower max-connections"
            ),
            (Cause::Kernel(operation, error), _) => {
                format!("cannot {operation} for {target}: {error}")
            }
            (Cause::Spoof(error), _) => format!("connection to {target} dropped: {error}"),
        }
    }
}

fn pathway_hint(mark: Mark) -> String {
    format!("is the pathway of mark {mark} not installed? run mmproxyctl pathway check {mark}")
}

fn kind_of(error: &io::Error) -> ConnectFailure {
    let Some(errno) = error.raw_os_error().map(Errno::from_raw) else {
        return ConnectFailure::Other;
    };
    match errno {
        Errno::ECONNREFUSED => ConnectFailure::ServiceDown,
        Errno::ETIMEDOUT => ConnectFailure::TimedOut,
        // EINVAL is what connect() says where the look-up finds a martian source
        Errno::EINVAL | Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::ENETDOWN => {
            ConnectFailure::NoRoute
        }
        Errno::EADDRNOTAVAIL | Errno::EADDRINUSE => ConnectFailure::NoPort,
        Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => {
            ConnectFailure::NoDescriptors
        }
        Errno::EPERM | Errno::EACCES => ConnectFailure::NotPermitted,
        _ => ConnectFailure::Other,
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
            assert_eq!(limiter.admit(subject, one, start), Some(0));
        }
        assert_eq!(limiter.admit(subject, one, start), None);
        assert_eq!(limiter.admit(subject, one, start), None);
        assert_eq!(limiter.admit(subject, other, start), Some(0));
        assert_eq!(limiter.admit(subject, one, start + WINDOW), Some(2));
        assert_eq!(limiter.admit(subject, one, start + WINDOW), Some(0));
    }

    #[test]
    fn a_flood_of_addresses_is_bounded() {
        let limiter = Limiter::default();
        let subject = Subject::Refused(Refusal::ProxyNotAllowed);
        let start = Instant::now();
        let said = (0..10_000u32)
            .filter(|n| {
                let about = IpAddr::V4(n.to_be_bytes().into());
                limiter.admit(subject, about, start).is_some()
            })
            .count();
        assert_eq!(said, MAX_SUBJECTS + BURST as usize);
        assert!(limiter.windows.lock().unwrap().len() <= MAX_SUBJECTS + 1);
    }

    #[test]
    fn hints_name_what_came() {
        let message = bad_header(HeaderError::NotProxy, b"SSH-2.0-OpenSSH_9.2\r\n");
        assert!(message.contains("an SSH banner"), "{message}");
        assert!(message.contains("send-proxy"), "{message}");
        let message = bad_header(HeaderError::NotProxy, b"\xffxyz\n");
        assert!(message.contains(r#""\xffxyz\n""#), "{message}");
        assert!(header_timeout(b"", Duration::from_secs(5)).contains("NLB"));
        assert!(!header_timeout(b"PRO", Duration::from_secs(5)).contains("NLB"));
    }
}
