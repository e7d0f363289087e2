//! A worker's listening sockets: which are read, and which one answers for a port.
//!
//! Owns: how they come and go while flows stay. Must not know: flows.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::UdpSocket;
use std::sync::Arc;

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::epoll::WaitableEpoll;
use super::{DRAIN, LISTENERS};

/// One of them.
pub(super) struct Listener {
    pub(super) socket: Arc<UdpSocket>,
    pub(super) port: u16,
    /// What the kernel last said about lost datagrams.
    pub(super) overflow: u32,
    /// It only answers, and is among those that end.
    leaves: bool,
}

/// What becomes of a worker's listeners.
#[derive(Debug)]
pub(in crate::relay::udp) struct Change {
    /// Of those it has.
    pub(in crate::relay::udp) gone: Vec<Arc<UdpSocket>>,
    /// Those it gets.
    pub(in crate::relay::udp) more: Vec<Arc<UdpSocket>>,
}

/// All of them.
#[derive(Default)]
pub(super) struct Listeners {
    /// A place is used again once its listener is no more: events go by it.
    places: Vec<Option<Listener>>,
    free: Vec<usize>,
    /// Places of those that leave, each with when it is no more, in milliseconds since the relay's start.
    ends: VecDeque<(u64, usize)>,
    /// Which of them answers for a port.
    by_port: HashMap<u16, usize>,
}

impl Listeners {
    /// Those there are from the beginning.
    ///
    /// # Errors
    /// When one cannot be waited for.
    pub(super) fn new(epoll: &WaitableEpoll, sockets: Vec<Arc<UdpSocket>>) -> io::Result<Self> {
        let mut listeners = Self::default();
        for socket in sockets {
            listeners.add(epoll, socket)?;
        }
        Ok(listeners)
    }

    pub(super) fn get(&self, at: usize) -> Option<&Listener> {
        self.places.get(at)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, at: usize) -> Option<&mut Listener> {
        self.places.get_mut(at)?.as_mut()
    }

    /// The one that answers for a port.
    pub(super) fn at(&self, port: u16) -> Option<usize> {
        self.by_port.get(&port).copied()
    }

    /// The ports that are answered for.
    pub(super) fn ports(&self) -> Box<[u16]> {
        self.by_port.keys().copied().collect()
    }

    /// Reads one more, which may be one that is about to go.
    ///
    /// # Errors
    /// When it cannot be waited for; nothing has changed then.
    pub(super) fn add(&mut self, epoll: &WaitableEpoll, socket: Arc<UdpSocket>) -> io::Result<()> {
        let port = socket.local_addr()?.port();
        let left = self.ends.iter().position(|(_, at)| {
            let listener = self.get(*at);
            listener.is_some_and(|one| Arc::ptr_eq(&one.socket, &socket))
        });
        let at = match (left, self.free.last()) {
            (Some(left), _) => self.ends[left].1,
            (None, Some(at)) => *at,
            (None, None) => self.places.len(),
        };
        let event = EpollEvent::new(EpollFlags::EPOLLIN, LISTENERS + at as u64);
        epoll.add(&socket, event)?;
        match left {
            Some(left) => _ = self.ends.remove(left),
            None => _ = self.free.pop(),
        }
        // several sockets of one port are as good as the first
        let answers = self.at(port).and_then(|at| self.get(at));
        if answers.is_none_or(|listener| listener.leaves) {
            self.by_port.insert(port, at);
        }
        let listener = Some(Listener {
            socket,
            port,
            overflow: 0,
            leaves: false,
        });
        match self.places.get_mut(at) {
            Some(place) => *place = listener,
            None => self.places.push(listener),
        }
        Ok(())
    }

    /// Reads from these no more, and lets them go when what was asked has had its time to be answered.
    pub(super) fn retire(&mut self, epoll: &WaitableEpoll, gone: &[Arc<UdpSocket>], now: u64) {
        let gone: HashSet<_> = gone.iter().map(Arc::as_ptr).collect();
        for (at, place) in self.places.iter_mut().enumerate() {
            if let Some(listener) = place
                && gone.contains(&Arc::as_ptr(&listener.socket))
            {
                listener.leaves = true;
                self.ends.push_back((now + DRAIN, at));
                // an error would mean that it is not in there
                let _ = epoll.delete(&listener.socket);
            }
        }
    }

    /// When the next one is no more, in milliseconds since the relay's start.
    pub(super) fn next_end(&self) -> Option<u64> {
        self.ends.front().map(|(end, _)| *end)
    }

    /// Lets go what has had its time; the ports that nothing answers for any more.
    pub(super) fn let_go(&mut self, now: u64) -> Vec<u16> {
        let mut gone = Vec::new();
        while let Some((_, at)) = self.ends.pop_front_if(|(end, _)| *end <= now) {
            self.free.push(at);
            if let Some(listener) = self.places[at].take()
                && self.by_port.get(&listener.port) == Some(&at)
            {
                self.by_port.remove(&listener.port);
                gone.push(listener.port);
            }
        }
        gone
    }

    /// Reads none of them any more.
    ///
    /// # Errors
    /// When the epoll instance fails.
    pub(super) fn stop(&mut self, epoll: &WaitableEpoll) -> io::Result<()> {
        let reading = self.places.iter().flatten();
        for listener in reading.filter(|listener| !listener.leaves) {
            epoll.delete(&listener.socket)?;
        }
        Ok(())
    }
}
