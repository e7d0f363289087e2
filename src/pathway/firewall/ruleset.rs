//! The mangle table as values: which lines are there, which are ours, which the old scripts left.
//!
//! Owns: reading `iptables-save` text. Must not know: which lines are wanted.

use std::collections::BTreeSet;

use crate::model::{Family, Interception, ListenNetwork, PortRange, Protocol, TRANSPARENT_MARK};
use crate::pathway::piece::{COMMENT, Chain, Job, Line, Made, Program};

/// One family's mangle table as one variant of iptables shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    /// The family.
    pub family: Family,
    /// Who reads and writes it.
    pub program: Program,
    /// The lines of OUTPUT, first to last.
    pub output: Vec<FoundLine>,
    /// The lines of PREROUTING, first to last.
    pub prerouting: Vec<FoundLine>,
    /// Whether another chain of the table holds a line.
    pub elsewhere: bool,
    /// What the first line would make.
    pub absent: Absent,
}

/// The parts of nf_tables' mangle table that are not there and come with the first line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Absent {
    /// The table itself.
    pub table: bool,
    /// Chains.
    pub chains: BTreeSet<Chain>,
}

/// A line as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundLine {
    /// The words behind `-A CHAIN`, as iptables-save wrote them.
    pub words: String,
    /// What it does, where it is a plain CONNMARK line, or a TPROXY line with our tag.
    pub connmark: Option<Connmark>,
}

/// A line that does nothing but save, restore or set one mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connmark {
    /// Which of them.
    pub job: Job,
    /// The mark it looks for, or sets.
    pub mark: u32,
    /// The bits it looks at, or writes.
    pub mask: u32,
    /// The bits it copies, on both sides.
    pub copied: u32,
    /// The comment.
    pub comment: Option<String>,
}

impl Connmark {
    /// The mark in our tag, where the line has one.
    pub fn tag(&self) -> Option<u32> {
        let text = self.comment.as_deref()?.strip_prefix(COMMENT)?;
        text.split(':').next()?.parse().ok()
    }

    /// What our lines had to make, as their tags remember it.
    pub fn made(&self) -> Option<Made> {
        let text = self.comment.as_deref()?.strip_prefix(COMMENT)?;
        Made::from_tag(text.split_once(':')?.1)
    }

    /// Whether it is this line: same job, mark, masks and tag.
    pub fn is(&self, line: &Line) -> bool {
        let mark = match line.job {
            Job::Save | Job::Restore => line.mark.get(),
            Job::Intercept(_) => TRANSPARENT_MARK,
        };
        self.tag() == Some(line.mark.get())
            && self.job == line.job
            && self.mark == mark
            && self.mask == line.mask.get()
            && self.copied == line.mask.get()
    }
}

impl Ruleset {
    /// A table without lines.
    pub fn empty(family: Family, program: Program) -> Self {
        Self {
            family,
            program,
            output: Vec::new(),
            prerouting: Vec::new(),
            elsewhere: false,
            absent: Absent::default(),
        }
    }

    /// Reads what `iptables-save -t mangle` wrote.
    pub fn parse(family: Family, program: Program, save: &str) -> Self {
        let mut ruleset = Self::empty(family, program);
        for line in save.lines() {
            let Some((chain, words)) = line
                .strip_prefix("-A ")
                .and_then(|rest| rest.split_once(' '))
            else {
                continue;
            };
            let chain = match chain {
                "OUTPUT" => &mut ruleset.output,
                "PREROUTING" => &mut ruleset.prerouting,
                _ => {
                    ruleset.elsewhere = true;
                    continue;
                }
            };
            chain.push(FoundLine {
                words: words.to_owned(),
                connmark: connmark(words).or_else(|| intercept(words)),
            });
        }
        ruleset
    }

    /// The lines of a chain.
    pub fn chain(&self, chain: Chain) -> &[FoundLine] {
        match chain {
            Chain::Output => &self.output,
            Chain::Prerouting => &self.prerouting,
        }
    }

    /// Every line with its chain.
    pub fn lines(&self) -> impl Iterator<Item = (Chain, &FoundLine)> {
        Chain::ALL
            .into_iter()
            .flat_map(|chain| self.chain(chain).iter().map(move |line| (chain, line)))
    }

    /// What a new line in the chain must remember: whether the chain and the table are there because of
    /// us. A table that is brings all of its chains with it.
    pub fn makes(&self, chain: Chain) -> Option<Made> {
        if self.absent.table || self.remembers_table() {
            return Some(Made::Table);
        }
        let remembered = |line: &FoundLine| line.connmark.as_ref().and_then(Connmark::made);
        if self.absent.chains.contains(&chain) {
            return Some(Made::Chain);
        }
        self.chain(chain).iter().find_map(remembered)
    }

    /// Whether a line in any chain remembers that the table is there because of us.
    pub fn remembers_table(&self) -> bool {
        self.lines()
            .any(|(_, line)| line.connmark.as_ref().and_then(Connmark::made) == Some(Made::Table))
    }

    /// Whether a line carries our tag.
    pub fn has_ours(&self) -> bool {
        self.lines().any(|(_, line)| {
            line.connmark
                .as_ref()
                .is_some_and(|line| line.tag().is_some())
        })
    }

    /// Whether any line is there.
    pub fn is_empty(&self) -> bool {
        !self.elsewhere && self.lines().next().is_none()
    }
}

/// Splits as iptables-restore does: at blanks, with `"…"` around what holds blanks and `\` before quotes.
fn split(words: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut word = None::<String>;
    let mut quoted = false;
    let mut chars = words.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().extend(chars.next()),
            ' ' if !quoted => out.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    out.extend(word);
    out
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// What a line does, or `None` where it has any word that a CONNMARK line of ours or of the old scripts has not.
fn connmark(words: &str) -> Option<Connmark> {
    let words = split(words);
    let mut words = words.iter().map(String::as_str);
    let (mut matched, mut job, mut comment) = (None, None, None);
    let (mut nfmask, mut ctmask) = (u32::MAX, u32::MAX);
    let mut matcher = "";
    while let Some(word) = words.next() {
        match word {
            // the scripts' `-i+` means "an interface whose name begins with -i" to iptables 1.8.9,
            // which takes the whole word for the name; versions before and after read `+`: any
            "-i" => _ = words.next().filter(|name| matches!(*name, "+" | "-i+"))?,
            "-o" => _ = words.next().filter(|name| matches!(*name, "+" | "-o+"))?,
            "-m" => matcher = words.next()?,
            "--mark" => {
                let value = words.next()?;
                let (mark, mask) = match value.split_once('/') {
                    Some((mark, mask)) => (number(mark)?, number(mask)?),
                    None => (number(value)?, u32::MAX),
                };
                if matched.replace((matcher, mark, mask)).is_some() {
                    return None;
                }
            }
            "--comment" => comment = Some(words.next()?.to_owned()),
            "-j" => _ = words.next().filter(|target| *target == "CONNMARK")?,
            "--save-mark" => job = Some(Job::Save),
            "--restore-mark" => job = Some(Job::Restore),
            "--nfmask" => nfmask = number(words.next()?)?,
            "--ctmask" => ctmask = number(words.next()?)?,
            _ => return None,
        }
    }
    let ((matcher, mark, mask), job) = (matched?, job?);
    let expected = match job {
        Job::Save => "mark",
        _ => "connmark",
    };
    (matcher == expected && nfmask == ctmask).then_some(Connmark {
        job,
        mark,
        mask,
        copied: nfmask,
        comment,
    })
}

/// What a TPROXY line of ours does; `None` where it has any other word, or not our tag: another program's
/// may look the same.
fn intercept(words: &str) -> Option<Connmark> {
    let words = split(words);
    let mut words = words.iter().map(String::as_str);
    let (mut network, mut protocol, mut ports, mut comment) = (None, None, None, None);
    let (mut on_ip, mut on_port, mut mark) = (None, None, None);
    let mut not_from_lo = false;
    while let Some(word) = words.next() {
        match word {
            "-d" => network = Some(words.next()?.parse().ok()?),
            "!" => not_from_lo = (words.next()?, words.next()?) == ("-i", "lo"),
            "-p" => protocol = Some(words.next()?.parse::<Protocol>().ok()?),
            "-m" => _ = words.next()?,
            "--dport" => {
                let text = words.next()?;
                let (first, last) = text.split_once(':').unwrap_or((text, text));
                ports = PortRange::new(first.parse().ok()?, last.parse().ok()?);
            }
            "--comment" => comment = Some(words.next()?.to_owned()),
            "-j" => _ = words.next().filter(|target| *target == "TPROXY")?,
            "--on-port" => on_port = words.next()?.parse().ok(),
            "--on-ip" => on_ip = words.next()?.parse().ok(),
            "--tproxy-mark" => {
                let (value, mask) = words.next()?.split_once('/')?;
                mark = Some((number(value)?, number(mask)?));
            }
            _ => return None,
        }
    }
    let listen = ListenNetwork::new(network?, ports?);
    let ((mark, mask), protocol) = (mark?, protocol?);
    let socket = listen.socket();
    let right = not_from_lo && on_ip == Some(socket.ip()) && on_port == Some(socket.port());
    let found = Connmark {
        job: Job::Intercept(Interception { protocol, listen }),
        mark: if right { mark } else { 0 },
        mask,
        copied: mask,
        comment,
    };
    found.tag().is_some().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Mark, Mask};

    fn line(mark: u32) -> Line {
        let mark = Mark::new(mark).unwrap();
        Line {
            family: Family::V4,
            chain: Chain::Output,
            job: Job::Save,
            mark,
            mask: Mask::default_for(mark),
        }
    }

    #[test]
    fn our_own_words_are_recognised() {
        for mark in [1, 255, 256, u32::MAX] {
            let line = line(mark);
            assert!(connmark(&line.to_string()).unwrap().is(&line), "{line}");
        }
        // what iptables-save makes of it
        let saved = "-m mark --mark 0x7b/0xff -m comment --comment \"mmproxyctl:123\" -j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff";
        assert!(connmark(saved).unwrap().is(&line(123)));
        assert!(
            connmark(&saved.replace("0x7b/0xff", "0x7b"))
                .is_some_and(|found| !found.is(&line(123)))
        );
    }

    #[test]
    fn our_own_interceptions_are_recognised() {
        for (text, protocol) in [
            ("203.0.113.0/24:443", Protocol::Tcp),
            ("[2001:db8:5::7]/128:1000-2000", Protocol::Udp),
        ] {
            let listen: ListenNetwork = text.parse().unwrap();
            let mark = Mark::new(123).unwrap();
            let line = Line {
                family: listen.family(),
                chain: Chain::Prerouting,
                job: Job::Intercept(Interception { protocol, listen }),
                mark,
                mask: Mask::new(0x20ff).unwrap(),
            };
            let words = line.to_string();
            assert!(intercept(&words).unwrap().is(&line), "{line}");
            for (ours, other) in [
                ("0x2000/0x20ff", "0x2000/0xff"),
                ("0x2000/0x20ff", "0x1/0x20ff"),
                ("! -i lo", "! -i eth0"),
                ("-p ", "-s 10.0.0.0/8 -p "),
                ("--on-port ", "--on-port 9"),
                (" --on-ip 203.0.113.0", ""),
                (" --on-ip 2001:db8:5::7", " --on-ip 2001:db8:5::8"),
            ] {
                let changed = words.replacen(ours, other, 1);
                let same = intercept(&changed).is_some_and(|found| found.is(&line));
                assert!(changed == words || !same, "{changed}");
            }
            // the same without our tag is another program's
            assert_eq!(intercept(&words.replace("mmproxyctl:", "tproxy:")), None);
        }
    }

    #[test]
    fn lines_of_the_old_scripts_are_recognised() {
        for words in [
            "-i -i+ -m mark --mark 0x7b -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
            "-o -o+ -m connmark --mark 0x7b -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
            "-m mark --mark 0x7b -j CONNMARK --save-mark",
        ] {
            let found = connmark(words).expect(words);
            assert_eq!(
                (found.mark, found.mask, found.comment),
                (123, u32::MAX, None)
            );
        }
    }

    #[test]
    fn other_programs_lines_are_not_taken_for_ours() {
        for words in [
            "-p udp -m mark --mark 0xca6c -m comment --comment \"wg-quick(8) rule for wg0\" -j CONNMARK --save-mark",
            "-i eth0 -m mark --mark 0x7b -j CONNMARK --save-mark",
            "-m mark ! --mark 0x7b -j CONNMARK --save-mark",
            "-m mark --mark 0x7b -j MARK --set-xmark 0x7b/0xff",
            "-m connmark --mark 0x7b -j CONNMARK --save-mark",
            "-m mark --mark 0x7b -m connmark --mark 0x7b -j CONNMARK --save-mark",
            "-m mark --mark 0x7b -j CONNMARK --save-mark --nfmask 0xff --ctmask 0xffff",
            "-m comment --comment \"a \\\"-j CONNMARK\\\" b\" -j ACCEPT",
            "-j CONNMARK --restore-mark",
        ] {
            assert_eq!(connmark(words), None, "{words}");
        }
    }
}
