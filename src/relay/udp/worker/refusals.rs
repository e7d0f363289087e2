//! What is not relayed: counted, and said as often as the limiter lets it.

use std::fmt;

use tracing::debug;

use super::Worker;
use crate::model::{ClientAddr, ProxyAddr};
use crate::relay::batch::Sent;
use crate::relay::counters::Refusal;
use crate::relay::header::HeaderError;
use crate::relay::report::{self, Subject};
use crate::relay::spp;
use crate::relay::udp::counters::Dropped;
use crate::relay::udp::datagram::DatagramError;
use crate::relay::udp::flow::Path;
use crate::relay::udp::table::Id;

impl Worker {
    pub(super) fn unfit(&self, path: &Path, error: DatagramError, bytes: &[u8]) {
        let (kind, message) = match error {
            DatagramError::Empty => return self.counters.lose(Dropped::Empty, 1),
            DatagramError::Version1 => {
                let message = format!("refused: {error}");
                return self.drop_datagram(Dropped::Version1, path, None, &message);
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

    pub(super) fn refuse_client(&self, kind: Refusal, path: &Path, client: ClientAddr) {
        let message = report::refused_client(kind, client.family());
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
        let client = client.as_ref().map(|client| client as &dyn fmt::Display);
        self.common
            .limiter
            .warn(Subject::Refused(kind), proxy, client, message);
    }

    pub(super) fn drop_datagram(
        &self,
        kind: Dropped,
        path: &Path,
        client: Option<ClientAddr>,
        message: &dyn fmt::Display,
    ) {
        self.counters.lose(kind, 1);
        let client = client.as_ref().map(|client| client as &dyn fmt::Display);
        self.common
            .limiter
            .warn(Subject::Dropped(kind), path.proxy(), client, message);
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
                let client = Some(&route.client as &dyn fmt::Display);
                self.common.limiter.warn(
                    Subject::Dropped(kind),
                    route.path.proxy(),
                    client,
                    &message,
                );
            }
            None => {
                debug!(%error, datagrams = sent.failed, "answers dropped: cannot send to a proxy")
            }
        }
    }
}
