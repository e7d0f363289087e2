//! How a worker's flows begin and end: admission, sockets, room for others.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use tracing::{debug, trace, warn};

use super::refusals::peers;
use super::{Held, Worker, client_of, view};
use crate::model::{PortPolicy, UdpHeader};
use crate::relay::client;
use crate::relay::counters::{ConnectFailure, Refusal};
use crate::relay::report::{self, ConnectError, Subject};
use crate::relay::udp::counters::{Dropped, Ended};
use crate::relay::udp::datagram::Client;
use crate::relay::udp::flow::{Flow, Key, Path, Route};
use crate::relay::udp::registry::{Admission, Opened, Rules};
use crate::relay::udp::scratch::NONE;
use crate::relay::udp::table::Id;
use crate::socket::Spoof;
use crate::socket::udp::{Answers, SpoofedUdp, spoofed_udp};

impl Worker {
    /// Begins the flow of a client that is not known yet, or not known here.
    pub(super) fn begin(&mut self, key: Key, path: &Path, client: &Client) -> Option<Id> {
        let address = client_of(client, path);
        if let Some(kind) = client::refusal(address.ip()) {
            self.refuse_client(kind, path, address);
            return None;
        }
        let asked = asked(client);
        let target = match self.settings.target_for(address, asked, path.port) {
            Ok(target) => target,
            Err(kind @ Refusal::DestinationRefused) => {
                let message = report::refused_destination(asked);
                self.refuse(kind, path.proxy(), Some(address), &message);
                return None;
            }
            Err(kind) => {
                self.refuse_client(kind, path, address);
                return None;
            }
        };
        let route = Route {
            key,
            path: *path,
            client: address,
            target,
            asked,
            spp: match client {
                Client::Spp(header) => Some(*header),
                Client::Named { .. } | Client::Proxy => None,
            },
        };
        let rules = Rules {
            flows: self.settings.max_flows,
            per_proxy: self.settings.max_flows_per_proxy,
            port: self.settings.port,
        };
        loop {
            match self
                .common
                .registry
                .admit(self.number, &route, &rules, self.now)
            {
                Admission::Adopted(flow) => return Some(self.adopt(flow)),
                Admission::Opened(opened) => return Some(self.opened(opened)),
                Admission::Full(proxy) if self.make_room(proxy) => {}
                Admission::Full(_) | Admission::Refused => {
                    let message = "dropped: no room for another flow";
                    self.drop_datagram(Dropped::TooManyFlows, path, Some(address), &message);
                    return None;
                }
            }
        }
    }

    pub(super) fn opened(&mut self, opened: Opened) -> Id {
        let Opened {
            flow,
            port_taken,
            moved,
            replaced,
        } = opened;
        for (from, why) in [(moved, Ended::Moved), (replaced, Ended::Replaced)] {
            if let Some(from) = from {
                self.counters.end(why);
                self.forget_flow(&from);
                from.set_socket(None);
                self.remember(from, None, why);
            }
        }
        self.counters.flows_opened.add(1);
        self.common.ports.load().count(flow.route.path.port);
        trace!(
            proxy.addr = %flow.route.path.proxy(), client.addr = %flow.route.client,
            target.addr = %flow.route.target, "flow begins"
        );
        self.hold(flow, port_taken)
    }

    pub(super) fn adopt(&mut self, flow: Arc<Flow>) -> Id {
        self.counters.flows_adopted.add(1);
        self.hold(flow, false)
    }

    pub(super) fn hold(&mut self, flow: Arc<Flow>, port_taken: bool) -> Id {
        let (key, proxy) = (flow.route.key, flow.route.path.proxy().ip());
        let socket = flow.socket();
        flow.set_used(self.now);
        let id = self.flows.insert(
            key,
            proxy,
            self.now,
            Held {
                flow,
                socket: None,
                port_taken,
                first: NONE,
                last: NONE,
                overflow: 0,
            },
        );
        self.counters.flows.add(1);
        if let Some(socket) = socket {
            self.common.loans.end_of(&socket);
            self.watch(id, socket);
        }
        id
    }

    /// Gives a flow its socket: what comes to it is read from now on.
    pub(super) fn watch(&mut self, id: Id, socket: Arc<UdpSocket>) -> bool {
        // edge-triggered: a socket is read until it is empty, and costs nothing until there is news
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, id.to_u64());
        if let Err(error) = self.epoll.add(&*socket, event) {
            // fs.epoll.max_user_watches is used up
            warn!(%error, "cannot watch a flow's socket");
            // it would keep the client's port from the next one
            if let Some(held) = self.flows.get(id) {
                held.flow.set_socket(None);
            }
            return false;
        }
        if let Some(held) = self.flows.get_mut(id) {
            held.socket = Some(socket);
        }
        true
    }

    /// Opens a flow's socket; false when there is none to be had. The flow ends then, unless its client is
    /// known from its first datagram only and the reason may pass.
    pub(super) fn open_socket(&mut self, id: Id) -> bool {
        let Some(held) = self.flows.get(id) else {
            return false;
        };
        let (flow, port_taken) = (Arc::clone(&held.flow), held.port_taken);
        let route = &flow.route;
        let settings = &self.settings;
        let spoof = Spoof {
            client: route.client,
            target: route.target,
            mark: settings.mark,
            port: if port_taken {
                PortPolicy::Any
            } else {
                settings.port
            },
        };
        let answers = match route.spp {
            // each answer needs room for a header in front of it
            Some(_) => Answers::Single,
            None => Answers::Coalesced,
        };
        let mut outcome = spoofed_udp(&spoof, answers).map_err(ConnectError::spoof);
        if let Err(Ok(error)) = &outcome
            && error.is_exhausted()
            && self.make_room_for(id)
        {
            outcome = spoofed_udp(&spoof, answers).map_err(ConnectError::spoof);
        }
        match outcome {
            Ok(SpoofedUdp {
                socket,
                port_given_up,
            }) => {
                if port_given_up {
                    self.common.registry.lost_port(&flow);
                }
                if port_given_up || port_taken {
                    self.counters.ports_given_up.add(1);
                    debug!(
                        proxy.addr = %route.path.proxy(), client.addr = %route.client,
                        "the client's port is taken: another one is used, the address kept"
                    );
                }
                let socket = Arc::new(self.leaving_spares(id, socket));
                flow.set_socket(Some(Arc::clone(&socket)));
                self.watch(id, socket)
            }
            Err(Ok(error)) => {
                self.counters.open_failed(error.kind);
                let message = error.message(route.target, &self.settings);
                self.say(Subject::ConnectFailed(error.kind), peers(route), &message);
                if self.settings.header != UdpHeader::First {
                    self.finish(id, Ended::NoSocket);
                }
                false
            }
            Err(Err(kind)) => {
                self.refuse_client(kind, &route.path, route.client);
                self.finish(id, Ended::NoSocket);
                false
            }
        }
    }

    /// Ends the flow that has been silent for longest, of all or of a proxy; false when there is none.
    pub(super) fn make_room(&mut self, proxy: Option<IpAddr>) -> bool {
        let (oldest, why) = match proxy {
            Some(proxy) => (self.flows.oldest_of(proxy), Ended::MaxFlowsPerProxy),
            None => (self.flows.oldest(), Ended::MaxFlows),
        };
        let Some(id) = oldest else { return false };
        self.finish(id, why);
        true
    }

    /// Nothing listens at the target. The flow ends; where only its first datagram says whose it is, only
    /// its socket ends: the service may be back before the proxy has any reason to say so again.
    pub(super) fn service_down(&mut self, id: Id) {
        let Some(held) = self.flows.get(id) else {
            return;
        };
        let route = held.flow.route;
        let message = format_args!("the service at {} is down: ICMP says so", route.target);
        self.say(
            Subject::Dropped(Dropped::ServiceDown),
            peers(&route),
            &message,
        );
        self.counters.open_failed(ConnectFailure::ServiceDown);
        if self.settings.header == UdpHeader::First {
            self.close_socket(id);
        } else {
            self.finish(id, Ended::ServiceDown);
        }
    }

    pub(super) fn close_socket(&mut self, id: Id) {
        drop(self.end_loan(id));
        let Some(held) = self.flows.get_mut(id) else {
            return;
        };
        held.flow.set_socket(None);
        if let Some(socket) = held.socket.take() {
            self.unwatch(socket);
        }
    }

    /// Ends a flow.
    pub(super) fn finish(&mut self, id: Id, why: Ended) {
        let Some(held) = self.flows.get(id) else {
            return;
        };
        let flow = Arc::clone(&held.flow);
        if self.common.registry.release(self.number, &flow) {
            let local = held.socket.as_deref().and_then(view::local);
            flow.set_socket(None);
            self.counters.end(why);
            trace!(
                proxy.addr = %flow.route.path.proxy(), client.addr = %flow.route.client, why = why.name(),
                "flow ends"
            );
            self.remember(flow, local, why);
        }
        self.forget(id);
    }

    /// Takes a flow out of this worker's table, whoever has it now.
    pub(super) fn forget(&mut self, id: Id) {
        self.unqueue(id, Dropped::FlowEnded);
        // then it is not in this worker's epoll, unless whoever took the flow over has lent it to this one
        let lent = self.lent() == Some(id);
        drop(self.end_loan(id));
        if let Some(held) = self.flows.remove(id) {
            self.counters.flows.sub_one();
            if let Some(socket) = held.socket
                && !lent
            {
                self.unwatch(socket);
            }
        }
    }

    pub(super) fn forget_flow(&mut self, flow: &Arc<Flow>) {
        let id = self.flows.find(&flow.route.key);
        if let Some(id) = id
            && let Some(held) = self.flows.get(id)
            && Arc::ptr_eq(&held.flow, flow)
        {
            self.forget(id);
        }
    }

    pub(super) fn unwatch(&self, socket: Arc<UdpSocket>) {
        // closing the last descriptor does it; another worker's copy keeps it in this epoll otherwise
        if let Err(shared) = Arc::try_unwrap(socket) {
            // an error means that it was not in there
            let _ = self.epoll.delete(&*shared);
        }
    }
}

/// Where the client sent to, as the proxy says.
pub(super) fn asked(client: &Client) -> Option<SocketAddr> {
    match client {
        Client::Named { asked, .. } => Some(*asked),
        Client::Spp(header) => Some(header.proxy()),
        Client::Proxy => None,
    }
}
