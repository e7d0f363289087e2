//! A worker's flows as they can be asked for.

use std::net::SocketAddr;

use super::{Held, Worker};
use crate::model::TargetAddr;
use crate::relay::udp::counters::Ended;
use crate::relay::udp::table::Id;
use crate::relay::view::{Ask, Connection, Query, Stage};

impl Worker {
    /// Answers once. Flows that ended are not remembered: a DNS server has thousands a minute.
    pub(super) fn answer(&mut self, query: &Query) {
        self.now = self.common.started.elapsed().as_millis() as u64;
        let meant = |id| {
            let row = self.row(self.flows.get(id)?);
            query.filter.matches(&row).then_some((id, row))
        };
        let rows: Vec<(Id, Connection)> = match query.what {
            Ask::Live | Ask::Kill => self.flows.ids().filter_map(meant).collect(),
            Ask::Recent => Vec::new(),
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

    fn row(&self, held: &Held) -> Connection {
        let flow = &held.flow;
        let route = &flow.route;
        let (bytes_to_target, bytes_to_client) = flow.bytes();
        let local = held
            .socket
            .as_ref()
            .and_then(|socket| socket.local_addr().ok());
        Connection {
            id: flow.id,
            instance: self.settings.name.to_string(),
            mark: self.settings.mark.get(),
            // a flow without payload has no socket yet
            stage: match &held.socket {
                Some(_) => Stage::Relaying,
                None => Stage::Connecting,
            },
            client: Some(route.client.get()),
            proxy: route.path.proxy(),
            port: Some(route.path.port),
            local: local.map(|local| SocketAddr::new(local.ip().to_canonical(), local.port())),
            target: Some(TargetAddr::get(route.target)),
            age_ms: self.now.saturating_sub(flow.since),
            idle_ms: self.now.saturating_sub(flow.used()),
            bytes_to_target,
            bytes_to_client,
            header: route.spp.is_none().then_some(2),
            unique_id: None,
            authority: None,
            ended: None,
        }
    }
}
