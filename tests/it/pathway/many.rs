//! How long 256 pathways take, beside the same with `ip` and `iptables`.

use std::fmt::Write;
use std::time::{Duration, Instant};

use super::{ctl, effects};
use crate::support::net::Host;

fn timed(what: &str, work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    let took = start.elapsed();
    println!("{what:<48} {took:>10.1?}");
    took
}

fn fresh(conf: &str) -> Host {
    let host = Host::new("many");
    host.write("etc/pathways.conf", conf);
    host
}

#[test]
fn two_hundred_and_fifty_six_pathways() {
    let mut conf = String::new();
    for mark in 1000..1256 {
        writeln!(conf, "{mark} mask=0x7ff").expect("a string");
    }
    let host = fresh(&conf);
    let add = |host: &Host| {
        let (code, _, err) = ctl(host, "-q pathway add --all");
        assert_eq!(code, 0, "{err}");
    };
    let first = timed("mmproxyctl pathway add --all", || add(&host));
    let again = (0..5).map(|_| timed("mmproxyctl pathway add --all, no change", || add(&host)));
    let again = again.min().expect("a run");
    let check = timed("mmproxyctl pathway check", || {
        assert_eq!(ctl(&host, "-q pathway check").0, 0);
    });

    // the very same commands, one process each, as a script would
    let plain = fresh(&conf);
    let (code, commands, err) = ctl(&plain, "-q pathway add --all --dry-run");
    assert_eq!(code, 0, "{err}");
    let commands: Vec<&str> = commands.lines().collect();
    assert_eq!(commands.len(), 256 * (4 + 2 + 6));
    let words = format!("{} ip and iptables calls", commands.len());
    let script = timed(&words, || {
        for command in &commands {
            plain.run(&command.replace('"', ""));
        }
    });
    let without_tags = |host: &Host| {
        let text = effects(host);
        let lines = text.lines().filter(|line| !line.starts_with(':'));
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };
    assert_eq!(without_tags(&plain), without_tags(&host));
    let clean = timed("mmproxyctl pathway del --all", || {
        assert_eq!(ctl(&host, "-q pathway del --all").0, 0);
    });
    assert!(first < Duration::from_secs(1), "{first:?}");
    assert!(again < Duration::from_millis(100), "{again:?}");
    assert!(check < script && clean < script);
}
