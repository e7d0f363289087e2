//! What all cells showed, and what is made of several rounds: medians, ratios, verdicts.
//!
//! Owns: the goals and the arithmetic. Must not know: how it is measured or drawn.

use std::collections::BTreeMap;

use crate::cell::{Figure, Row, Sample};
use crate::load::Failures;
use crate::programs::Program;

/// What mmproxyctl shall reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// At least this share of the direct connection.
    OfDirect(f64),
    /// At most this.
    AtMost(f64),
    /// Shown only.
    None,
}

impl Row {
    /// Its lines of the table.
    pub(crate) fn figures(self) -> &'static [Figure] {
        match self {
            Self::Bulk => &[Figure::BulkRate, Figure::BulkCpu],
            Self::Exchange => &[
                Figure::ExchangeRate,
                Figure::ExchangeP99,
                Figure::ExchangeCpu,
            ],
            Self::Connect => &[Figure::ConnectRate, Figure::ConnectP99, Figure::ConnectCpu],
            Self::Idle => &[Figure::IdleMemory, Figure::IdleDescriptors],
        }
    }
}

impl Figure {
    /// What it is, with its unit.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::BulkRate => "bulk echo, Gbit/s",
            Self::BulkCpu => "… relay CPU, s per GB",
            Self::ExchangeRate => "request/response 64 B, per s",
            Self::ExchangeP99 => "… p99 µs",
            Self::ExchangeCpu => "… relay CPU, µs per exchange",
            Self::ConnectRate => "connect + one exchange + reset, per s",
            Self::ConnectP99 => "… p99 µs",
            Self::ConnectCpu => "… relay CPU, µs each",
            Self::IdleMemory => "idle connection, kB of relay memory",
            Self::IdleDescriptors => "… relay descriptors each",
        }
    }

    /// Its name in the JSON file.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::BulkRate => "bulk_gbit_per_s",
            Self::BulkCpu => "bulk_cpu_s_per_gb",
            Self::ExchangeRate => "exchange_per_s",
            Self::ExchangeP99 => "exchange_p99_us",
            Self::ExchangeCpu => "exchange_cpu_us",
            Self::ConnectRate => "connect_per_s",
            Self::ConnectP99 => "connect_p99_us",
            Self::ConnectCpu => "connect_cpu_us",
            Self::IdleMemory => "idle_kb",
            Self::IdleDescriptors => "idle_descriptors",
        }
    }

    /// What mmproxyctl shall reach.
    pub(crate) fn goal(self) -> Goal {
        match self {
            Self::BulkRate => Goal::OfDirect(0.80),
            Self::BulkCpu => Goal::AtMost(0.40),
            Self::ExchangeRate => Goal::OfDirect(0.50),
            Self::ExchangeP99 => Goal::AtMost(800.0),
            Self::ExchangeCpu => Goal::AtMost(7.5),
            Self::ConnectRate => Goal::OfDirect(0.70),
            Self::ConnectCpu => Goal::AtMost(33.0),
            Self::IdleMemory => Goal::AtMost(1.0),
            Self::ConnectP99 | Self::IdleDescriptors => Goal::None,
        }
    }

    /// Whether more is better: exactly the figures that have a ratio to the direct connection.
    pub(crate) fn is_rate(self) -> bool {
        matches!(
            self,
            Self::BulkRate | Self::ExchangeRate | Self::ConnectRate
        )
    }

    /// A value as people read it.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::ExchangeRate | Self::ConnectRate | Self::ExchangeP99 | Self::ConnectP99 => {
                thousands(value)
            }
            Self::ExchangeCpu | Self::ConnectCpu | Self::IdleDescriptors => format!("{value:.1}"),
            Self::BulkRate | Self::BulkCpu | Self::IdleMemory => format!("{value:.2}"),
        }
    }
}

/// What stands in a cell of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Verdict {
    /// Not measured, or without meaning there.
    Absent,
    /// So many failures: there is no figure.
    Failed(u64),
    /// The median of the rounds.
    Median(f64),
}

/// Which table: without CONNMARK rules or with them.
pub(crate) type Connmark = bool;

/// All samples.
#[derive(Debug, Default)]
pub(crate) struct Results {
    samples: BTreeMap<(Connmark, Row, Program), Vec<Sample>>,
}

impl Results {
    /// One more sample.
    pub(crate) fn add(&mut self, connmark: Connmark, row: Row, program: Program, sample: Sample) {
        self.samples
            .entry((connmark, row, program))
            .or_default()
            .push(sample);
    }

    /// The samples of a cell, in the order of the rounds.
    pub(crate) fn samples(&self, connmark: Connmark, row: Row, program: Program) -> &[Sample] {
        self.samples
            .get(&(connmark, row, program))
            .map_or(&[], Vec::as_slice)
    }

    /// Failures of a cell over all rounds.
    pub(crate) fn failures(&self, connmark: Connmark, row: Row, program: Program) -> Failures {
        let mut all = Failures::default();
        for sample in self.samples(connmark, row, program) {
            all.merge(sample.failures.clone());
        }
        all
    }

    /// What a cell shows of a figure. One failure in any round and there is no figure.
    pub(crate) fn verdict(
        &self,
        connmark: Connmark,
        row: Row,
        program: Program,
        figure: Figure,
    ) -> Verdict {
        let failed = self.failures(connmark, row, program).total();
        if failed > 0 {
            return Verdict::Failed(failed);
        }
        median(
            self.samples(connmark, row, program)
                .iter()
                .filter_map(|sample| sample.figures.get(&figure).copied()),
        )
        .map_or(Verdict::Absent, Verdict::Median)
    }

    /// A median as a share of the direct connection's, where that has a meaning.
    pub(crate) fn ratio(
        &self,
        connmark: Connmark,
        row: Row,
        program: Program,
        figure: Figure,
    ) -> Option<f64> {
        if !figure.is_rate() || program == Program::Direct {
            return None;
        }
        // rounds drift together: the ratio is taken within each and the median of the ratios shown
        let of = |program| {
            self.samples(connmark, row, program)
                .iter()
                .map(|sample| sample.figures.get(&figure).copied())
        };
        median(
            of(program)
                .zip(of(Program::Direct))
                .filter_map(|(own, direct)| Some(own? / direct?)),
        )
    }

    /// Whether a program reaches the goal; `None` where there is nothing to compare.
    pub(crate) fn reaches(
        &self,
        connmark: Connmark,
        row: Row,
        program: Program,
        figure: Figure,
    ) -> Option<bool> {
        let Verdict::Median(value) = self.verdict(connmark, row, program, figure) else {
            return None;
        };
        match figure.goal() {
            Goal::AtMost(limit) => Some(value <= limit),
            Goal::OfDirect(share) => Some(self.ratio(connmark, row, program, figure)? >= share),
            Goal::None => None,
        }
    }

    /// The share of the machine that others used: median and worst of all timed cells.
    pub(crate) fn foreign(&self) -> Option<(f64, f64)> {
        let seen = || {
            self.samples
                .values()
                .flatten()
                .filter_map(|sample| sample.foreign)
        };
        Some((median(seen())?, seen().fold(0.0, f64::max)))
    }
}

/// The middle one, or the mean of the middle two.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Rounded to a whole number, with thin groups of three.
pub(crate) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
