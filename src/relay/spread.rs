//! Even shares of a relay's connections for its workers.
//!
//! Owns: when an accepted connection goes to another worker than the one that accepted it, and its way
//! there. Must not know: what a connection is beyond its socket.
//!
//! The kernel deals connections out to the listeners of one address by a hash: of two long connections
//! both are on one thread half of the time. So a worker with more than its share hands the next one
//! over, before it is read. With many connections the hash is even enough: the allowance
//! grows with them, and handing over becomes rare. Where connections come and go within the second, the
//! next ones even it out by themselves, and handing over, a wake-up of another thread each, would only cost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use super::counters::Counters;
use crate::socket::stream::Taken;

/// By what part of the least busy worker's connections another may have more.
const ALLOWANCE: u64 = 4;

/// How long connections stay with a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turnover {
    /// Fewer left within the last second than are there: where one goes now matters for a while.
    Slow,
    /// More left than are there.
    Fast,
}

/// Where each worker of a relay gets connections from the others.
#[derive(Debug)]
pub(super) struct Spread {
    shares: Vec<Share>,
}

/// What a worker gets from the others. Nothing more comes once it is closed and empty.
pub(super) type Arrivals = mpsc::UnboundedReceiver<Taken>;

#[derive(Debug)]
struct Share {
    counters: Arc<Counters>,
    door: mpsc::UnboundedSender<Taken>,
    /// On their way to this worker; the accepting workers add to it, unlike to its counters.
    coming: AtomicU64,
}

impl Share {
    /// Connections that are, or are about to be, this worker's.
    fn load(&self) -> u64 {
        self.counters.active.get() + self.coming.load(Ordering::Relaxed)
    }
}

impl Spread {
    /// For the workers with these counters, in their order.
    pub(super) fn new(counters: &[Arc<Counters>]) -> (Self, Vec<Arrivals>) {
        let share = |counters: &Arc<Counters>| {
            let (door, arrivals) = mpsc::unbounded_channel();
            let share = Share {
                counters: Arc::clone(counters),
                door,
                coming: AtomicU64::new(0),
            };
            (share, arrivals)
        };
        let (shares, arrivals) = counters.iter().map(share).unzip();
        (Self { shares }, arrivals)
    }

    /// Connections open or handed over and not yet taken, of all workers. Read without a lock: off by
    /// what happens in the same instant.
    pub(super) fn open(&self) -> u64 {
        self.shares.iter().map(Share::load).sum()
    }

    /// The least busy worker, if this one has more than its share.
    pub(super) fn elsewhere(&self, here: usize, turnover: Turnover) -> Option<usize> {
        let mine = self.shares[here].load();
        let loads = self.shares.iter().map(Share::load).enumerate();
        let (to, least) = loads.min_by_key(|(_, load)| *load)?;
        let allowed = match turnover {
            Turnover::Slow => least / ALLOWANCE,
            // one thread must not be left with everything either
            Turnover::Fast => least + 1,
        };
        (mine > least + allowed).then_some(to)
    }

    /// Gives a connection to a worker; gives it back where that one takes nothing any more.
    pub(super) fn send(&self, to: usize, accepted: Taken) -> Result<(), Taken> {
        let share = &self.shares[to];
        share.coming.fetch_add(1, Ordering::Relaxed);
        share.door.send(accepted).map_err(|refused| {
            share.coming.fetch_sub(1, Ordering::Relaxed);
            refused.0
        })
    }

    /// Called by a worker for each of its arrivals, just before it is among its active ones or refused.
    pub(super) fn arrived(&self, here: usize) {
        self.shares[here].coming.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;
    use crate::model::ProxyAddr;
    use std::net::TcpListener;

    fn accepted(listener: &TcpListener) -> Taken {
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, peer) = listener.accept().unwrap();
        Taken {
            socket,
            peer: ProxyAddr::new(peer),
            port: 0,
        }
    }

    /// All land on worker 0 by the hash; counts as the workers would.
    fn deal(workers: usize, connections: usize, turnover: Turnover) -> Vec<u64> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let counters: Vec<Arc<Counters>> = (0..workers).map(|_| Arc::default()).collect();
        let (spread, mut arrivals) = Spread::new(&counters);
        for _ in 0..connections {
            match spread.elsewhere(0, turnover) {
                Some(to) => spread.send(to, accepted(&listener)).unwrap(),
                None => counters[0].active.add(1),
            }
        }
        assert_eq!(spread.open(), connections as u64);
        for (here, arrivals) in arrivals.iter_mut().enumerate() {
            while arrivals.try_recv().is_ok() {
                counters[here].active.add(1);
                spread.arrived(here);
            }
        }
        assert_eq!(spread.open(), connections as u64);
        counters.iter().map(|of| of.active.get()).collect()
    }

    #[test]
    fn few_are_dealt_out_evenly_and_many_may_differ_a_little() {
        let deal = |workers, connections| deal(workers, connections, Turnover::Slow);
        assert_eq!(deal(2, 2), [1, 1]);
        assert_eq!(deal(2, 4), [2, 2]);
        assert_eq!(deal(3, 6), [2, 2, 2]);
        assert_eq!(deal(1, 5), [5]);
        let many = deal(2, 90);
        assert_eq!(many.iter().sum::<u64>(), 90);
        assert!(many[0] > many[1] && many[0] <= many[1] + many[1] / ALLOWANCE + 1);
    }

    #[test]
    fn short_ones_stay_unless_it_is_out_of_hand() {
        assert_eq!(deal(2, 2, Turnover::Fast), [2, 0]);
        assert_eq!(deal(2, 90, Turnover::Fast), [60, 30]);
    }

    #[test]
    fn a_worker_that_drains_takes_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let counters: Vec<Arc<Counters>> = (0..2).map(|_| Arc::default()).collect();
        let (spread, mut arrivals) = Spread::new(&counters);
        assert!(spread.send(1, accepted(&listener)).is_ok());
        arrivals[1].close();
        assert!(spread.send(1, accepted(&listener)).is_err());
        // what came before is still there
        assert!(arrivals[1].try_recv().is_ok());
        spread.arrived(1);
        assert_eq!(spread.open(), 0);
    }
}
