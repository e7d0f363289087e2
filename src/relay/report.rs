//! What is said about connections that were not relayed, and how often: a proxy that is misconfigured
//! makes thousands of the same line.
//!
//! Owns: the rate of warnings and the words for what went wrong. Must not know: sockets in flight.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tracing::field::display;
use tracing::{debug, warn};

use super::counters::{ConnectFailure, Refusal};
use super::header::{self, HeaderError};
use super::settings::Settings;
use super::udp::counters::Dropped;
use super::view::Reason;
use super::worker::{Conn, Worker};
use crate::model::{ClientAddr, Endpoint, Family, Mark, NamedTargets, ProxyAddr, TargetAddr};
use crate::socket::stream::StreamListener;
use crate::socket::udp::{Bound, udp_bound};
use crate::socket::{Failure, SpoofError};

/// The time in which a subject may use up its lines.
pub(super) const WINDOW: Duration = Duration::from_secs(10);
/// How many lines of one kind about one address are said in that time.
const BURST: u32 = 5;
/// How many kinds and addresses are told apart; beyond that they share one allowance per kind.
const MAX_SUBJECTS: usize = 1024;
/// How many lines are kept for whoever asks what went wrong.
const MAX_RECENT: usize = 64;

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
pub(super) struct Limiter {
    windows: Mutex<HashMap<Key, Window>>,
    /// The last line of each kind about each proxy, the newest last.
    recent: Mutex<Vec<LastError>>,
}

/// A kind of line, and the address it is about; none when there are too many to tell apart.
pub(super) type Key = (Subject, Option<IpAddr>);

#[derive(Debug)]
struct Window {
    since: Instant,
    said: u32,
    held_back: u64,
}

/// What becomes of a warning.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Say it, and that so many like it were not said.
    Say(u64),
    /// Hold it back; for the first of a window, [`Limiter::settle`] this key when the window is over.
    HoldBack(Option<Key>),
}

/// What became of a line.
#[derive(Debug)]
pub(super) enum Said {
    /// It was said, and is the last error.
    Warned(LastError),
    /// It was held back; for the first of a window, [`Limiter::settle`] this key when the window is over.
    HeldBack(Option<Key>),
}

impl Limiter {
    pub(super) fn admit(&self, subject: Subject, about: IpAddr, now: Instant) -> Admission {
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
    pub(super) fn say(
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
    pub(super) fn recent(&self) -> Vec<LastError> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.clone()
    }

    /// Says how many were held back even if none like them follows; to be called [`WINDOW`] after the first.
    pub(super) fn settle(&self, key: Key, proxy: ProxyAddr, message: &str) {
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
    pub(super) fn warn_about_listener(
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

/// One line about a connection that is not relayed, as a warning unless there were too many like it.
pub(super) fn warn(conn: &Conn, subject: Subject, message: &dyn fmt::Display) {
    let entry = &conn.entry;
    warn_about(
        conn.worker(),
        subject,
        (entry.proxy(), entry.client()),
        message,
    );
}

/// The same about a connection that was not even entered.
pub(super) fn warn_about(
    worker: &Rc<Worker>,
    subject: Subject,
    peers: (ProxyAddr, Option<ClientAddr>),
    message: &dyn fmt::Display,
) {
    let limiter = &worker.common.limiter;
    match limiter.say(subject, peers, message) {
        Said::Warned(error) => worker.remember(error),
        Said::HeldBack(None) => {}
        Said::HeldBack(Some(key)) => {
            let (worker, message) = (Rc::clone(worker), message.to_string());
            tokio::task::spawn_local(async move {
                tokio::time::sleep(WINDOW).await;
                let _named = worker.span.enter();
                worker.common.limiter.settle(key, peers.0, &message);
            });
        }
    }
}

/// The line about a relayed connection that is over.
pub(super) fn ended(conn: &Conn, error: Option<&io::Error>) {
    let entry = &conn.entry;
    let (bytes_in, bytes_out) = entry.bytes();
    debug!(
        client.addr = entry.client().map(display),
        proxy.addr = %entry.proxy(),
        target.addr = entry.target().map(display),
        bytes.r#in = bytes_in,
        bytes.out = bytes_out,
        duration = ?Duration::from_millis(entry.age()),
        reason = entry.reason().map(Reason::name),
        error = error.map(display),
        "closed"
    );
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
pub(super) fn unanswered(target: TargetAddr, mark: Option<Mark>) -> String {
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

/// A destination in a header that is not to be connected to.
pub(super) fn refused_destination(asked: Option<SocketAddr>) -> String {
    match asked {
        Some(asked) => format!(
            "refused: the destination {asked} in the PROXY header is in none of destinations=, or not of the client's family"
        ),
        None => "refused: the PROXY header names no destination (LOCAL or UNKNOWN)".to_owned(),
    }
}

/// Why a client address is refused.
pub(super) fn refused_client(refusal: Refusal, family: Family, named: &NamedTargets) -> String {
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
            if let Some(name) = named.of(family) {
                return format!(
                    "refused: the target {name} has no {family} address: the log says why it is not resolved"
                );
            }
            return format!("refused: the instance has no {family} target for this client");
        }
        Refusal::PortNotServed => {
            "refused: rules handed it over from a port outside of the listen address's range"
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

fn pathway_hint(mark: Option<Mark>) -> String {
    match mark {
        Some(mark) => format!(
            "is the pathway of mark {mark} not installed? run mmproxyctl pathway check {mark}"
        ),
        None => "does no routing rule lead replies from the target back to this host? a mark and \
                 mmproxyctl pathway add MARK do"
            .to_owned(),
    }
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
