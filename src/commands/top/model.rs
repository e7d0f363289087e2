//! What `top` shows: two readings make rates, many make a history. Pure.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::overview::{InstanceReport, Process};
use crate::relay::view::Connection;

/// How many rates are kept for the sparklines; the widest terminals show fewer.
pub(super) const HISTORY: usize = 120;

/// What was seen at one time.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) at: Instant,
    pub(super) processes: Vec<Process>,
    pub(super) connections: Vec<Connection>,
}

/// One instance in one process, with its rates: while a process drains, another may run the same one.
#[derive(Debug)]
pub(super) struct InstanceRow {
    pid: u32,
    pub(super) report: InstanceReport,
    pub(super) connections: f64,
    pub(super) to_target: f64,
    pub(super) to_client: f64,
    /// Bytes per second both ways, the newest last.
    pub(super) history: VecDeque<u64>,
}

/// One connection, with its rates.
#[derive(Debug)]
pub(super) struct ConnectionRow {
    pub(super) connection: Connection,
    pub(super) to_target: f64,
    pub(super) to_client: f64,
}

/// The order of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Order {
    #[default]
    Rate,
    Bytes,
    Age,
    Idle,
}

impl Order {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Bytes => "bytes",
            Self::Age => "age",
            Self::Idle => "idle",
        }
    }
}

/// What there is to show.
#[derive(Debug, Default)]
pub(super) struct Model {
    at: Option<Instant>,
    pub(super) instances: Vec<InstanceRow>,
    connections: Vec<ConnectionRow>,
    pub(super) selected: usize,
    /// Only the selected instance's connections.
    pub(super) only: bool,
    pub(super) order: Order,
    pub(super) paused: bool,
    /// Why there is nothing new.
    pub(super) lost: Option<String>,
    pub(super) pids: Vec<u32>,
}

impl Model {
    /// Takes a new reading.
    pub(super) fn take(&mut self, reading: Reading) {
        let seconds = self
            .at
            .map(|at| reading.at.duration_since(at).as_secs_f64())
            .filter(|seconds| *seconds > 0.0);
        let rate = |now: u64, then: u64| {
            seconds.map_or(0.0, |seconds| now.saturating_sub(then) as f64 / seconds)
        };
        let chosen = self.instances.get(self.selected);
        let chosen = chosen.map(|row| (row.pid, row.report.name.clone()));
        let mut before: HashMap<(u32, String), InstanceRow> = self
            .instances
            .drain(..)
            .map(|row| ((row.pid, row.report.name.clone()), row))
            .collect();
        self.pids = reading.processes.iter().map(|one| one.pid).collect();
        let reports = reading.processes.into_iter().flat_map(|one| {
            let pid = one.pid;
            one.instances.into_iter().map(move |report| (pid, report))
        });
        self.instances = reports
            .map(|(pid, report)| {
                let old = before.remove(&(pid, report.name.clone()));
                let then = old.as_ref().map_or(report.totals, |row| row.report.totals);
                let now = &report.totals;
                let to_target = rate(now.bytes_to_target, then.bytes_to_target);
                let to_client = rate(now.bytes_to_client, then.bytes_to_client);
                let connections = rate(now.accepted, then.accepted);
                let mut history = old.map(|row| row.history).unwrap_or_default();
                if history.len() == HISTORY {
                    history.pop_front();
                }
                history.push_back((to_target + to_client) as u64);
                InstanceRow {
                    pid,
                    connections,
                    to_target,
                    to_client,
                    history,
                    report,
                }
            })
            .collect();
        self.selected = chosen
            .and_then(|(pid, name)| {
                let is = |row: &InstanceRow| row.report.name == name;
                let rows = &self.instances;
                // its process may have gone, but the instance goes on
                rows.iter()
                    .position(|row| row.pid == pid && is(row))
                    .or_else(|| rows.iter().position(is))
            })
            .unwrap_or(self.selected)
            .min(self.instances.len().saturating_sub(1));
        // ids are a process's own: the accepted time makes them as good as unique among several
        let old: HashMap<(String, u64), (u64, u64)> = self
            .connections
            .drain(..)
            .map(
                |ConnectionRow {
                     connection: one, ..
                 }| {
                    let bytes = (one.bytes_to_target, one.bytes_to_client);
                    ((one.instance, one.id), bytes)
                },
            )
            .collect();
        self.connections = reading
            .connections
            .into_iter()
            .map(|connection| {
                let now = (connection.bytes_to_target, connection.bytes_to_client);
                let key = (connection.instance.clone(), connection.id);
                // one that is new since the last look has moved all of its bytes in between
                let first = if connection.age_ms as f64 <= seconds.unwrap_or(0.0) * 1000.0 {
                    (0, 0)
                } else {
                    now
                };
                let then = old.get(&key).copied().unwrap_or(first);
                ConnectionRow {
                    to_target: rate(now.0, then.0),
                    to_client: rate(now.1, then.1),
                    connection,
                }
            })
            .collect();
        self.sort();
        self.at = Some(reading.at);
        self.lost = None;
    }

    /// There was no new reading.
    pub(super) fn lost(&mut self, why: String) {
        self.lost = Some(why);
    }

    /// The selected instance's name.
    fn chosen(&self) -> Option<&str> {
        Some(&self.instances.get(self.selected)?.report.name)
    }

    /// The connections to show.
    pub(super) fn connections(&self) -> impl Iterator<Item = &ConnectionRow> {
        let only = self.chosen().filter(|_| self.only);
        self.connections
            .iter()
            .filter(move |row| only.is_none_or(|name| row.connection.instance == name))
    }

    /// Moves the selection among the instances.
    pub(super) fn select(&mut self, by: isize) {
        let last = self.instances.len().saturating_sub(1);
        self.selected = self.selected.saturating_add_signed(by).min(last);
    }

    /// Shows the selected instance's connections only, or all again.
    pub(super) fn toggle_only(&mut self) {
        self.only = !self.only;
    }

    /// The next order of connections.
    pub(super) fn next_order(&mut self) {
        self.order = match self.order {
            Order::Rate => Order::Bytes,
            Order::Bytes => Order::Age,
            Order::Age => Order::Idle,
            Order::Idle => Order::Rate,
        };
        self.sort();
    }

    fn sort(&mut self) {
        let order = self.order;
        let key = |row: &ConnectionRow| {
            let one = &row.connection;
            match order {
                Order::Rate => (row.to_target + row.to_client) as u64,
                Order::Bytes => one.bytes_to_target + one.bytes_to_client,
                Order::Age => one.age_ms,
                Order::Idle => one.idle_ms,
            }
        };
        self.connections.sort_by(|a, b| {
            let (a, b) = ((key(b), a.connection.id), (key(a), b.connection.id));
            a.cmp(&b)
        });
    }
}
