//! A worker's flows: look-up by key, and who has been silent for longest, in all and per proxy.
//!
//! Owns: the order of flows by their last datagram. Must not know: sockets, clocks, what a flow is for.
//!
//! All flows of a relay have one idle timeout, so the order of their ends is the order of their last
//! datagrams: no timer wheel is needed, but a list to whose tail a flow moves when it is used. Moving it for
//! every datagram would cost more than it tells, so a flow moves at most once in [`GRAIN`] milliseconds.
//! Everything here is O(1); a tick costs one look at the head, and O(1) for each flow that ends.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;

/// How much time may pass between a flow's datagram and its move to the tail, in milliseconds.
pub(super) const GRAIN: u64 = 16;

/// How many entries an empty table keeps room for: a flood leaves no memory behind.
const KEPT: usize = 1024;

/// No flow, no lane.
const NONE: u32 = u32::MAX;

/// A flow's place in the table; used again once the flow is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Id(u32);

impl Id {
    /// As a number, for epoll.
    pub(super) fn to_u64(self) -> u64 {
        self.0.into()
    }

    /// From a number that [`Id::to_u64`] made.
    pub(super) fn from_u64(number: u64) -> Option<Self> {
        u32::try_from(number).ok().map(Self)
    }
}

/// A flow's neighbours in one order.
#[derive(Debug, Clone, Copy)]
struct Links {
    older: u32,
    newer: u32,
}

/// Both ends of one order.
#[derive(Debug, Clone, Copy)]
struct Ends {
    oldest: u32,
    newest: u32,
}

impl Ends {
    const EMPTY: Self = Self {
        oldest: NONE,
        newest: NONE,
    };
}

/// The orders a flow is in.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// Among all flows.
    All = 0,
    /// Among those of its proxy.
    Proxy = 1,
}

#[derive(Debug)]
struct Entry<K, F> {
    key: K,
    flow: F,
    /// When it was last used, in milliseconds, at most [`GRAIN`] too early.
    used: u64,
    links: [Links; 2],
    lane: u32,
}

/// The flows of one proxy.
#[derive(Debug)]
struct Lane {
    proxy: IpAddr,
    ends: Ends,
    flows: u32,
}

/// Flows by key and by age. Times are milliseconds on any clock that never goes back.
#[derive(Debug)]
pub(super) struct Table<K, F> {
    by_key: HashMap<K, u32>,
    entries: Vec<Option<Entry<K, F>>>,
    free: Vec<u32>,
    all: Ends,
    lanes: Vec<Lane>,
    free_lanes: Vec<u32>,
    by_proxy: HashMap<IpAddr, u32>,
}

impl<K: Hash + Eq + Clone, F> Table<K, F> {
    /// An empty table.
    pub(super) fn new() -> Self {
        Self {
            by_key: HashMap::new(),
            entries: Vec::new(),
            free: Vec::new(),
            all: Ends::EMPTY,
            lanes: Vec::new(),
            free_lanes: Vec::new(),
            by_proxy: HashMap::new(),
        }
    }

    /// How many flows there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// The flow with this key.
    #[inline]
    pub(super) fn find(&self, key: &K) -> Option<Id> {
        self.by_key.get(key).copied().map(Id)
    }

    /// A flow that is there.
    #[inline]
    pub(super) fn get(&self, id: Id) -> Option<&F> {
        Some(&self.entry(id.0)?.flow)
    }

    /// A flow that is there.
    #[inline]
    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut F> {
        Some(&mut self.entry_mut(id.0)?.flow)
    }

    /// Adds a flow of a proxy, used now. A flow with the same key must have been removed.
    pub(super) fn insert(&mut self, key: K, proxy: IpAddr, now: u64, flow: F) -> Id {
        debug_assert!(!self.by_key.contains_key(&key));
        let lane = self.lane(proxy);
        let entry = Some(Entry {
            key: key.clone(),
            flow,
            used: now,
            links: [Links {
                older: NONE,
                newer: NONE,
            }; 2],
            lane,
        });
        let at = match self.free.pop() {
            Some(at) => {
                self.entries[at as usize] = entry;
                at
            }
            None => {
                self.entries.push(entry);
                // a flow has a socket, and no process has 2^32 of them
                (self.entries.len() - 1) as u32
            }
        };
        self.by_key.insert(key, at);
        self.lanes[lane as usize].flows += 1;
        self.append(Order::All, at);
        self.append(Order::Proxy, at);
        Id(at)
    }

    /// Takes a flow out.
    pub(super) fn remove(&mut self, id: Id) -> Option<F> {
        self.entry(id.0)?;
        self.unlink(Order::All, id.0);
        self.unlink(Order::Proxy, id.0);
        let entry = self.entries.get_mut(id.0 as usize)?.take()?;
        self.free.push(id.0);
        self.by_key.remove(&entry.key);
        let lane = &mut self.lanes[entry.lane as usize];
        lane.flows -= 1;
        if lane.flows == 0 {
            self.by_proxy.remove(&lane.proxy);
            self.free_lanes.push(entry.lane);
        }
        if self.by_key.is_empty() && self.entries.len() > KEPT {
            *self = Self::new();
        }
        Some(entry.flow)
    }

    /// Notes that a flow is used; says whether it moved, which it does at most once in [`GRAIN`].
    #[inline]
    pub(super) fn touch(&mut self, id: Id, now: u64) -> bool {
        match self.entry_mut(id.0) {
            Some(entry) if now.saturating_sub(entry.used) >= GRAIN => entry.used = now,
            _ => return false,
        }
        self.unlink(Order::All, id.0);
        self.unlink(Order::Proxy, id.0);
        self.append(Order::All, id.0);
        self.append(Order::Proxy, id.0);
        true
    }

    /// The flow that has been silent for longest.
    pub(super) fn oldest(&self) -> Option<Id> {
        some(self.all.oldest)
    }

    /// The flow of a proxy that has been silent for longest.
    pub(super) fn oldest_of(&self, proxy: IpAddr) -> Option<Id> {
        let lane = *self.by_proxy.get(&proxy)?;
        some(self.lanes[lane as usize].ends.oldest)
    }

    /// Of the proxy that has most flows, the one that has been silent for longest. Looks at every proxy.
    pub(super) fn oldest_of_most(&self) -> Option<Id> {
        let most = self.lanes.iter().max_by_key(|lane| lane.flows)?;
        some(most.ends.oldest)
    }

    /// When the flow that has been silent for longest was last used, in milliseconds.
    pub(super) fn oldest_use(&self) -> Option<u64> {
        Some(self.entry(self.all.oldest)?.used)
    }

    /// All flows, in no order.
    pub(super) fn ids(&self) -> impl Iterator<Item = Id> + '_ {
        self.by_key.values().copied().map(Id)
    }

    fn lane(&mut self, proxy: IpAddr) -> u32 {
        if let Some(&lane) = self.by_proxy.get(&proxy) {
            return lane;
        }
        let fresh = Lane {
            proxy,
            ends: Ends::EMPTY,
            flows: 0,
        };
        let at = match self.free_lanes.pop() {
            Some(at) => {
                self.lanes[at as usize] = fresh;
                at
            }
            None => {
                self.lanes.push(fresh);
                (self.lanes.len() - 1) as u32
            }
        };
        self.by_proxy.insert(proxy, at);
        at
    }

    fn entry(&self, at: u32) -> Option<&Entry<K, F>> {
        self.entries.get(at as usize)?.as_ref()
    }

    fn entry_mut(&mut self, at: u32) -> Option<&mut Entry<K, F>> {
        self.entries.get_mut(at as usize)?.as_mut()
    }

    fn ends(&mut self, order: Order, at: u32) -> &mut Ends {
        match (order, self.entry(at).map(|entry| entry.lane)) {
            (Order::Proxy, Some(lane)) => &mut self.lanes[lane as usize].ends,
            _ => &mut self.all,
        }
    }

    fn links(&mut self, order: Order, at: u32) -> Option<&mut Links> {
        Some(&mut self.entry_mut(at)?.links[order as usize])
    }

    /// Puts an entry that is in no place of an order at its newest end.
    fn append(&mut self, order: Order, at: u32) {
        let ends = self.ends(order, at);
        let older = std::mem::replace(&mut ends.newest, at);
        if ends.oldest == NONE {
            ends.oldest = at;
        }
        if let Some(links) = self.links(order, older) {
            links.newer = at;
        }
        if let Some(links) = self.links(order, at) {
            *links = Links { older, newer: NONE };
        }
    }

    /// Closes an order where an entry stood.
    fn unlink(&mut self, order: Order, at: u32) {
        let Some(&mut Links { older, newer }) = self.links(order, at) else {
            return;
        };
        let ends = self.ends(order, at);
        if ends.oldest == at {
            ends.oldest = newer;
        }
        if ends.newest == at {
            ends.newest = older;
        }
        if let Some(links) = self.links(order, older) {
            links.newer = newer;
        }
        if let Some(links) = self.links(order, newer) {
            links.older = older;
        }
    }
}

fn some(at: u32) -> Option<Id> {
    (at != NONE).then_some(Id(at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn proxy(number: u8) -> IpAddr {
        [10, 0, 0, number].into()
    }

    #[test]
    fn a_used_flow_goes_last() {
        let mut table = Table::new();
        let a = table.insert("a", proxy(1), 0, ());
        let b = table.insert("b", proxy(1), 1, ());
        assert!(!table.touch(a, GRAIN - 1));
        assert_eq!(table.oldest(), Some(a));
        assert!(table.touch(a, GRAIN));
        assert_eq!(table.oldest(), Some(b));
        assert_eq!(table.oldest_use(), Some(1));
        assert_eq!(table.remove(b), Some(()));
        assert_eq!(table.remove(b), None);
        assert_eq!(table.oldest(), Some(a));
        assert_eq!(table.find(&"b"), None);
    }

    #[test]
    fn the_proxy_that_has_most_gives() {
        let mut table = Table::new();
        assert_eq!(table.oldest_of_most(), None);
        let quiet = table.insert(0, proxy(1), 0, ());
        let flood = [1, 2, 3].map(|key| table.insert(key, proxy(2), key, ()));
        assert_eq!(table.oldest_of_most(), Some(flood[0]));
        for id in flood {
            table.remove(id);
        }
        assert_eq!(table.oldest_of_most(), Some(quiet));
        table.remove(quiet);
        assert_eq!(table.oldest_of_most(), None);
    }

    /// What the table must do, written without any cleverness.
    #[derive(Default)]
    struct Model(Vec<(u16, u8, u64)>);

    impl Model {
        fn touch(&mut self, key: u16, now: u64) {
            if let Some(at) = self.0.iter().position(|flow| flow.0 == key)
                && now - self.0[at].2 >= GRAIN
            {
                let (key, proxy, _) = self.0.remove(at);
                self.0.push((key, proxy, now));
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u16, u8),
        Touch(u16),
        Remove(u16),
        Expire(u64),
        Evict(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..40u16, 0..3u8).prop_map(|(key, proxy)| Step::Insert(key, proxy)),
            4 => (0..40u16).prop_map(Step::Touch),
            1 => (0..40u16).prop_map(Step::Remove),
            1 => (0..200u64).prop_map(Step::Expire),
            1 => (0..3u8).prop_map(Step::Evict),
        ]
    }

    proptest! {
        #[test]
        fn does_what_a_plain_list_does(steps in prop::collection::vec((step(), 0..30u64), 1..200)) {
            let mut table: Table<u16, u16> = Table::new();
            let mut model = Model::default();
            let mut now = 0;
            for (step, later) in steps {
                now += later;
                match step {
                    Step::Insert(key, by) if table.find(&key).is_none() => {
                        table.insert(key, proxy(by), now, key);
                        model.0.push((key, by, now));
                    }
                    Step::Insert(key, _) | Step::Touch(key) => {
                        if let Some(id) = table.find(&key) {
                            table.touch(id, now);
                        }
                        model.touch(key, now);
                    }
                    Step::Remove(key) => {
                        let removed = table.find(&key).and_then(|id| table.remove(id));
                        prop_assert_eq!(removed, model.0.iter().find(|flow| flow.0 == key).map(|flow| flow.0));
                        model.0.retain(|flow| flow.0 != key);
                    }
                    Step::Expire(timeout) => {
                        while table.oldest_use().is_some_and(|used| used + timeout <= now) {
                            let oldest = table.oldest().unwrap();
                            prop_assert_eq!(table.remove(oldest), Some(model.0.remove(0).0));
                        }
                    }
                    Step::Evict(by) => {
                        let at = model.0.iter().position(|flow| flow.1 == by);
                        let evicted = table.oldest_of(proxy(by)).and_then(|id| table.remove(id));
                        prop_assert_eq!(evicted, at.map(|at| model.0.remove(at).0));
                    }
                }
                prop_assert_eq!(table.len(), model.0.len());
                prop_assert_eq!(table.ids().count(), model.0.len());
                let oldest = table.oldest().and_then(|id| table.get(id).copied());
                prop_assert_eq!(oldest, model.0.first().map(|flow| flow.0));
                prop_assert_eq!(table.oldest_use(), model.0.first().map(|flow| flow.2));
                for by in 0..3 {
                    let oldest = table.oldest_of(proxy(by)).and_then(|id| table.get(id).copied());
                    prop_assert_eq!(oldest, model.0.iter().find(|flow| flow.1 == by).map(|flow| flow.0));
                }
            }
        }
    }
}
