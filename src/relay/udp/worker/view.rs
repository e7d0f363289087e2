//! A worker's flows as they can be asked for.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use super::Worker;
use crate::model::{Mark, TargetAddr};
use crate::relay::udp::counters::Ended;
use crate::relay::udp::flow::Flow;
use crate::relay::udp::table::Id;
use crate::relay::view::{self, Ask, Connection, HeaderKind, Query, Stage};

/// How many ended flows each worker of a relay remembers: hours of players, seconds of a DNS server.
const REMEMBERED: usize = 1024;

/// Flows that ended, oldest first.
#[derive(Default)]
pub(super) struct Recent(VecDeque<Past>);

struct Past {
    flow: Arc<Flow>,
    /// The flow's socket, if it had one in the end.
    local: Option<SocketAddr>,
    /// When it ended, in milliseconds since the relay's start.
    at: u64,
    why: Ended,
}

impl Worker {
    /// Notes how a flow ended.
    pub(super) fn remember(&mut self, flow: Arc<Flow>, local: Option<SocketAddr>, why: Ended) {
        let past = &mut self.recent.0;
        if past.len() == REMEMBERED {
            past.pop_front();
        }
        past.push_back(Past {
            flow,
            local,
            at: self.now,
            why,
        });
    }

    /// Answers once.
    pub(super) fn answer(&mut self, query: &Query) {
        self.now = self.common.started.elapsed().as_millis() as u64;
        let meant = |id| {
            let held = self.flows.get(id)?;
            let row = self.row(&held.flow, held.socket.as_deref().and_then(local), self.now);
            query.filter.matches(&row).then_some((id, row))
        };
        let rows: Vec<(Id, Connection)> = match query.what {
            Ask::Live | Ask::Kill => self.flows.ids().filter_map(meant).collect(),
            Ask::Recent => {
                let _ = query.reply.send(self.ended(query));
                return;
            }
        };
        if query.what == Ask::Kill {
            for (id, _) in &rows {
                self.finish(*id, Ended::Killed);
            }
        }
        // whoever asked may have given up
        let _ = query
            .reply
            .send(rows.into_iter().map(|(_, row)| row).collect());
    }

    fn ended(&self, query: &Query) -> Vec<Connection> {
        let rows = self.recent.0.iter().map(|past| Connection {
            ended: Some(view::Ended {
                ago_ms: self.now.saturating_sub(past.at),
                reason: past.why.name().to_owned(),
            }),
            ..self.row(&past.flow, past.local, past.at)
        });
        rows.filter(|row| query.filter.matches(row)).collect()
    }

    /// A flow as it is, or was, at a time.
    fn row(&self, flow: &Flow, local: Option<SocketAddr>, now: u64) -> Connection {
        let route = &flow.route;
        let (bytes_to_target, bytes_to_client) = flow.bytes();
        Connection {
            id: flow.id,
            instance: self.settings.name.to_string(),
            mark: self.settings.mark.map_or(0, Mark::get),
            // a flow without payload has no socket yet
            stage: match local {
                Some(_) => Stage::Relaying,
                None => Stage::Connecting,
            },
            client: Some(route.client.get()),
            proxy: route.path.proxy(),
            port: Some(route.path.port),
            local,
            target: Some(TargetAddr::get(route.target)),
            age_ms: now.saturating_sub(flow.since),
            idle_ms: now.saturating_sub(flow.used()),
            bytes_to_target,
            bytes_to_client,
            header: Some(match route.spp {
                Some(_) => HeaderKind::SPP,
                None => HeaderKind::Proxy(2),
            }),
            unique_id: None,
            authority: None,
            ended: None,
        }
    }
}

/// The address and port that the service sees.
pub(super) fn local(socket: &UdpSocket) -> Option<SocketAddr> {
    let local = socket.local_addr().ok()?;
    Some(SocketAddr::new(local.ip().to_canonical(), local.port()))
}
