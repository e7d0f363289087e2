//! A pathway: the kernel's return road for one source proxy.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use ipnet::IpNet;
use serde::Serialize;

use super::{InstanceName, Interception, ValueError};

/// A firewall mark (`SO_MARK`, fwmark of `ip rule`), never 0: 0 means "unmarked" to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Mark(NonZeroU32);

impl Mark {
    /// The mark with this value, or `None` for 0.
    pub fn new(value: u32) -> Option<Self> {
        NonZeroU32::new(value).map(Self)
    }

    /// The value as `SO_MARK` takes it.
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A u32 in decimal, or in hexadecimal behind `0x`. A leading zero is refused: `ip` and go-mmproxy read
/// `0123` as octal.
fn parse_u32(text: &str) -> Option<u32> {
    let octal = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
    if text.strip_prefix('0').is_some_and(octal) {
        return None;
    }
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u32::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if text.starts_with('+') => None,
        None => text.parse().ok(),
    }
}

impl FromStr for Mark {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const EXPECTED: &str = "a mark from 1 to 4294967295, decimal or 0x hexadecimal";
        match parse_u32(text).map(Self::new) {
            Some(Some(mark)) => Ok(mark),
            Some(None) => Err(ValueError::new(
                "mark 0 means unmarked to the kernel",
                EXPECTED,
            )),
            None => Err(ValueError::new(format!("'{text}' is not a mark"), EXPECTED)),
        }
    }
}

/// Which bits of a packet's mark a pathway looks at and writes (fwmask of `ip rule`, nfmask of CONNMARK).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Mask(NonZeroU32);

impl Mask {
    /// The mask with this value, or `None` for 0.
    pub fn new(value: u32) -> Option<Self> {
        NonZeroU32::new(value).map(Self)
    }

    /// 0xff for marks up to 255, else all ones: leaves room for other programs' bits where it can.
    pub fn default_for(mark: Mark) -> Self {
        let bits = if mark.get() <= 0xff { 0xff } else { u32::MAX };
        Self(NonZeroU32::new(bits).unwrap_or(NonZeroU32::MAX))
    }

    /// The bits.
    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// With the bit of packets that are handed to transparent listeners ([`Pathway::transparent_mask`]).
    pub(crate) fn transparent(self) -> Self {
        Self(self.0 | TRANSPARENT_MARK)
    }

    /// Whether packets of another pathway with this mark would be taken for some that are to be handed to
    /// the transparent listeners of a pathway with this mask.
    pub(crate) fn takes_for_intercepted(self, other: Mark) -> bool {
        other.get() & self.transparent().get() == TRANSPARENT_MARK
    }

    /// Whether every bit of the mark is inside the mask; else no packet could ever match.
    pub fn covers(self, mark: Mark) -> bool {
        mark.get() & self.get() == mark.get()
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl FromStr for Mask {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        parse_u32(text).and_then(Self::new).ok_or_else(|| {
            ValueError::new(
                format!("'{text}' is not a mask"),
                "a mask other than 0 such as 0xff",
            )
        })
    }
}

/// A routing table of the pathway's own: never unspec (0), default (253), main (254) or local (255).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct TableId(u32);

impl TableId {
    /// The table with this number, or `None` for one of the system's own.
    pub fn new(value: u32) -> Option<Self> {
        (!matches!(value, 0 | 253..=255)).then_some(Self(value))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for TableId {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const EXPECTED: &str =
            "a table number other than 0, 253 (default), 254 (main) and 255 (local)";
        match parse_u32(text).map(Self::new) {
            Some(Some(table)) => Ok(table),
            Some(None) => Err(ValueError::new(
                format!("table {text} belongs to the system"),
                EXPECTED,
            )),
            None => Err(ValueError::new(
                format!("'{text}' is not a table number"),
                EXPECTED,
            )),
        }
    }
}

/// The priority of a pathway's marked rules; the unmarked ones stand [`Priority::UNMARKED_STEP`] further on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Priority(u32);

impl Priority {
    /// What a pathway gets that does not choose: before Tailscale's rules, which begin at 5210.
    pub const DEFAULT: Self = Self(100);
    /// How far behind the marked rules the unmarked loopback rules stand.
    pub const UNMARKED_STEP: u32 = 100;
    /// The last priority whose unmarked rules still come before the main table (32766).
    pub const MAX: u32 = 32_665;

    /// The priority with this value: 1 to [`Priority::MAX`] (0 is the local table's own rule).
    pub fn new(value: u32) -> Option<Self> {
        (1..=Self::MAX).contains(&value).then_some(Self(value))
    }

    /// The priority of the marked rules.
    pub fn get(self) -> u32 {
        self.0
    }

    /// The priorities of the three rules for routers' ICMP, right behind the marked ones: what leads past,
    /// what is led past, and where that ends.
    pub fn icmp(self) -> [u32; 3] {
        [1, 2, 3].map(|behind| self.0 + behind)
    }

    /// The priority of the unmarked loopback rules.
    pub fn unmarked(self) -> u32 {
        self.0 + Self::UNMARKED_STEP
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Priority {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        parse_u32(text).and_then(Self::new).ok_or_else(|| {
            ValueError::new(
                format!("'{text}' is not a rule priority"),
                format!(
                    "a priority from 1 to {}, before the main table's rule",
                    Self::MAX
                ),
            )
        })
    }
}

/// When a pathway's CONNMARK rules are installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnmarkMode {
    /// Always.
    #[default]
    Always,
    /// Only while a target is not loopback: loopback targets work without them, and without conntrack.
    Auto,
    /// Never.
    Off,
}

impl FromStr for ConnmarkMode {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "always" => Ok(Self::Always),
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => Err(ValueError::new(
                format!("'{text}' is not a connmark mode"),
                "always, auto or off",
            )),
        }
    }
}

/// The bit that tells packets handed to transparent listeners: none that Tailscale (0xff0000), kube-proxy
/// (0x4000, 0x8000), wg-quick (0xca6c) or a pathway with a mark up to 255 looks at.
pub const TRANSPARENT_MARK: u32 = 0x2000;

/// A pathway as wanted: what the kernel shall hold for one mark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pathway {
    /// What people call it (`name=`), for display only.
    pub name: Option<String>,
    /// The mark of its relays' sockets.
    pub mark: Mark,
    /// The bits of the mark that count.
    pub mask: Mask,
    /// Its local-route table.
    pub table: TableId,
    /// Where its rules stand.
    pub priority: Priority,
    /// When CONNMARK rules are installed.
    pub connmark: ConnmarkMode,
    /// Targets beyond 127.0.0.0/8 and ::1, which every pathway serves: from `targets=` and from the
    /// instances that use the mark. Host bits cleared, never loopback.
    pub targets: BTreeSet<IpNet>,
    /// The instances that use the mark for UDP.
    #[serde(skip)]
    pub udp: BTreeSet<InstanceName>,
    /// What is handed to the transparent listeners of the instances that use the mark.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub interceptions: BTreeSet<Interception>,
}

impl Pathway {
    /// The pathway of a mark with nothing said about it, or `None` where the mark is no usable table number.
    pub fn with_defaults(mark: Mark) -> Option<Self> {
        Some(Self {
            name: None,
            mark,
            mask: Mask::default_for(mark),
            table: TableId::new(mark.get())?,
            priority: Priority::DEFAULT,
            connmark: ConnmarkMode::default(),
            targets: BTreeSet::new(),
            udp: BTreeSet::new(),
            interceptions: BTreeSet::new(),
        })
    }

    /// Which bits of the mark tell packets that are handed to transparent listeners, which have
    /// [`TRANSPARENT_MARK`].
    ///
    /// Not the pathway's own mark: the relay's connections carry that, and where they go to an address that
    /// is intercepted as well (a proxy in line before the services), they would come back here. The mask has
    /// the pathway's bits, so that what carries its mark never matches.
    pub fn transparent_mask(&self) -> Mask {
        self.mask.transparent()
    }

    /// Whether CONNMARK rules are wanted for the targets as they are.
    pub fn wants_connmark(&self) -> bool {
        match self.connmark {
            ConnmarkMode::Always => true,
            ConnmarkMode::Auto => !self.targets.is_empty(),
            ConnmarkMode::Off => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_in_both_bases() {
        assert_eq!("123".parse::<Mark>().unwrap(), "0x7b".parse().unwrap());
        for bad in [
            "0",
            "0x0",
            "-1",
            "+1",
            "0x+1",
            "4294967296",
            "",
            "12a",
            "0x",
            "0123",
            "00",
        ] {
            assert!(bad.parse::<Mark>().is_err(), "{bad}");
        }
    }

    #[test]
    fn system_tables_are_refused() {
        for bad in ["0", "253", "254", "255"] {
            assert!(bad.parse::<TableId>().is_err(), "{bad}");
        }
        assert_eq!(
            "4000000000".parse::<TableId>().unwrap().get(),
            4_000_000_000
        );
    }

    #[test]
    fn default_mask_leaves_room() {
        assert_eq!(Mask::default_for(Mark::new(255).unwrap()).get(), 0xff);
        assert_eq!(Mask::default_for(Mark::new(256).unwrap()).get(), u32::MAX);
    }
}
