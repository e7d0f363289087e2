//! What is said about connections that were not relayed, and how often: a proxy that is misconfigured
//! makes thousands of the same line.
//!
//! Owns: the words for what went wrong; the rate of warnings in `limit`. Must not know: sockets in flight.

mod limit;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;
use tracing::debug;

use super::counters::{ConnectFailure, Refusal};
use super::header::{self, HeaderError};
use super::settings::Settings;
use super::view::Reason;
use super::worker::{Conn, Worker};
use crate::model::{ClientAddr, Family, Mark, NamedTargets, ProxyAddr, TargetAddr};
use crate::socket::udp::{Bound, udp_bound};
use crate::socket::{Failure, SpoofError};

pub use limit::LastError;
pub(super) use limit::{Limiter, Said, Subject, WINDOW};

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
        None => "does no routing rule lead replies from the target back to this host? \
                 mmproxyctl run --mark MARK --manage-pathways makes them"
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
