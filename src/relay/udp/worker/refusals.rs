//! What is not relayed: counted, and said as often as the limiter lets it.

use std::fmt;
use std::sync::{Arc, PoisonError};

use tracing::debug;

use super::Worker;
use crate::model::{ClientAddr, ProxyAddr};
use crate::relay::batch::Sent;
use crate::relay::counters::Refusal;
use crate::relay::header::HeaderError;
use crate::relay::report::{self, Said, Subject, WINDOW};
use crate::relay::spp;
use crate::relay::udp::counters::Dropped;
use crate::relay::udp::datagram::DatagramError;
use crate::relay::udp::flow::{Path, Route};
use crate::relay::udp::table::Id;

impl Worker {
    pub(super) fn unfit(&self, path: &Path, error: DatagramError, bytes: &[u8]) {
        let (kind, message) = match error {
            DatagramError::Empty => return self.counters.lose(Dropped::Empty, 1),
            DatagramError::Version1 => {
                let message = format!("refused: {error}");
                return self.drop_datagram(Dropped::Version1, path, None, &message);
            }
            DatagramError::Version2 | DatagramError::Simple => {
                (Refusal::NoHeader, format!("refused: {error}"))
            }
            DatagramError::Header(HeaderError::NotProxy) => {
                (Refusal::NoHeader, report::no_header_in_datagram(bytes))
            }
            DatagramError::Spp(spp::SppError::Magic(..)) => {
                (Refusal::NoHeader, report::no_header_in_datagram(bytes))
            }
            DatagramError::Header(_) => (Refusal::BadHeader, format!("refused: {error}")),
            DatagramError::Truncated | DatagramError::Spp(_) => {
                (Refusal::HeaderTruncated, format!("refused: {error}"))
            }
        };
        self.refuse(kind, path.proxy(), None, &message);
    }

    /// A datagram without a header and without a flow, and the kind of header that it has all the same.
    pub(super) fn nobodys(&self, path: &Path, foreign: Option<DatagramError>) {
        match foreign {
            Some(error @ DatagramError::Version1) => self.unfit(path, error, &[]),
            Some(error) => {
                let message = format_args!("dropped: no flow of this proxy port, and {error}");
                self.drop_datagram(Dropped::NoFlow, path, None, &message);
            }
            None => {
                let message = "dropped: no header, and no flow of this proxy port: the flow began before \
                               this relay did, or ended here before it did at the proxy";
                self.drop_datagram(Dropped::NoFlow, path, None, &message);
            }
        }
    }

    pub(super) fn refuse_client(&self, kind: Refusal, path: &Path, client: ClientAddr) {
        let message = report::refused_client(kind, client.family(), &self.settings.named);
        self.refuse(kind, path.proxy(), Some(client), &message);
    }

    pub(super) fn refuse(
        &self,
        kind: Refusal,
        proxy: ProxyAddr,
        client: Option<ClientAddr>,
        message: &dyn fmt::Display,
    ) {
        self.counters.refuse(kind);
        self.say(Subject::Refused(kind), (proxy, client), message);
    }

    pub(super) fn drop_datagram(
        &self,
        kind: Dropped,
        path: &Path,
        client: Option<ClientAddr>,
        message: &dyn fmt::Display,
    ) {
        self.counters.lose(kind, 1);
        self.say(Subject::Dropped(kind), (path.proxy(), client), message);
    }

    pub(super) fn not_sent(&self, sent: &Sent, flow: Option<Id>) {
        let Some(error) = &sent.error else { return };
        let kind = match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Dropped::ServiceDown,
            Some(libc::EMSGSIZE) => Dropped::TooLong,
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Dropped::BufferFull,
            _ => Dropped::NotSent,
        };
        self.counters.lose(kind, sent.failed);
        let route = flow
            .and_then(|id| self.flows.get(id))
            .map(|held| held.flow.route);
        match route {
            Some(route) => {
                let message = format_args!("dropped: cannot send to {}: {error}", route.target);
                self.say(Subject::Dropped(kind), peers(&route), &message);
            }
            None => {
                debug!(%error, datagrams = sent.failed, "answers dropped: cannot send to a proxy")
            }
        }
    }

    /// One line, as often as the limiter lets it.
    pub(super) fn say(
        &self,
        subject: Subject,
        peers: (ProxyAddr, Option<ClientAddr>),
        message: &dyn fmt::Display,
    ) {
        let common = &self.common;
        match common.limiter.say(subject, peers, message) {
            Said::Warned(error) => {
                let last = &common.last_error;
                *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
            Said::HeldBack(None) => {}
            Said::HeldBack(Some(key)) => {
                let (common, span) = (Arc::clone(common), self.span.clone());
                let message = message.to_string();
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(WINDOW).await;
                    let _named = span.enter();
                    common.limiter.settle(key, peers.0, &message);
                });
            }
        }
    }
}

/// Whom a line about a flow is about.
pub(super) fn peers(route: &Route) -> (ProxyAddr, Option<ClientAddr>) {
    (route.path.proxy(), Some(route.client))
}
