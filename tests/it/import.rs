//! `import`: what runs today becomes the two files, which then run; and what it left in the kernel goes.

use std::process::Output;

use crate::compat::lab::Old;
use crate::support::net::Host;

fn ctl(host: &Host, words: &str) -> Output {
    host.mmproxyctl(words).output().expect("mmproxyctl")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a host's rules, routes and mangle tables look like to other programs.
fn kernel(host: &Host) -> String {
    let mut all = String::new();
    for words in [
        "ip rule",
        "ip -6 rule",
        "ip route show table all type local dev lo",
        "ip -6 route show table all type local dev lo",
    ] {
        all.push_str(&host.run(words));
    }
    for program in ["iptables", "ip6tables"] {
        all.push_str(&host.run(&format!("{program} -t mangle -S")));
    }
    all
}

const UNIT: &str = "[Service]\n\
    ExecStartPost=/sbin/ip rule add from 127.0.0.1/8 iif lo table 123\n\
    ExecStartPost=/sbin/ip route add local 0.0.0.0/0 dev lo table 123\n\
    ExecStart=/usr/bin/go-mmproxy -4 127.0.0.1:2200 -6 \"[::1]:2200\" -allowed-subnets ALLOW -l 10.0.0.1:2222\n";

#[test]
fn a_unit_becomes_files_that_run() {
    let old = Old::with_loopback_routing(123);
    let wks = &old.lab.wks;
    let services = old.services(2200);
    let allow = wks.write("nets.txt", "10.0.0.0/24\n");
    wks.write(
        "units/go-mmproxy.service",
        UNIT.replace("ALLOW", &allow.display().to_string()),
    );
    let units = wks.dir().join("units");
    let printed = stdout(&ctl(wks, &format!("import units {}", units.display())));
    assert!(
        printed.contains("go-mmproxy.service:4: ExecStart="),
        "{printed}"
    );
    // what the unit's routing left, both families, is named and stays
    assert!(printed.contains("# ip rule del"), "{printed}");
    assert!(
        printed.contains("# ip -6 route del local default dev lo table 123"),
        "{printed}"
    );

    wks.write("etc/allow.txt", "10.0.0.2\n");
    let written = stdout(&ctl(
        wks,
        &format!("import --write --clean units {}", units.display()),
    ));
    assert!(written.contains("1 relay"), "{written}");
    let rules = wks.ip("rule") + &wks.ip("-6 rule");
    assert!(!rules.contains("123"), "{rules}");
    stdout(&ctl(wks, "pathway add --all"));
    let relay = wks.spawn(wks.mmproxyctl("run --all"));
    relay.wait_log("ready");
    old.assert_seen("10.0.0.1:2222", &services);

    // nothing is written over
    let refused = ctl(wks, &format!("import --write units {}", units.display()));
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    // and what mmproxyctl has made is nobody's leftover
    let again = stdout(&ctl(
        wks,
        &format!("import --clean units {}", units.display()),
    ));
    assert!(again.contains("nothing is left in the kernel"), "{again}");
    old.assert_seen("10.0.0.1:2222", &services);
}

#[test]
fn leftovers_of_each_ancestor_go_and_nothing_else() {
    let wks = Host::new("wks01");
    // other programs': a VPN's table, a transparent proxy's, a mark that is not ours
    for words in [
        "rule add priority 5210 fwmark 0x80000/0xff0000 lookup main",
        "rule add fwmark 7 lookup 77",
        "route add local default dev lo table 77",
        "rule add from 192.0.2.1 lookup 78",
        "route add default dev lo table 78",
    ] {
        wks.ip(words);
    }
    wks.run("iptables -t mangle -A OUTPUT -m mark --mark 7 -j CONNMARK --save-mark");
    wks.run("iptables -t mangle -A PREROUTING -m mark --mark 123 -p udp -j CONNMARK --save-mark");
    let before = kernel(&wks);
    for (source, commands) in [
        (
            "go-mmproxy -l 10.0.0.1:1 -mark 123",
            // the READMEs' rules, and the scripts'
            vec![
                "ip rule add from 127.0.0.1/8 iif lo table 123",
                "ip -6 rule add from ::1/128 iif lo table 123",
                "ip route add local 0.0.0.0/0 dev lo table 123",
                "ip -6 route add local ::/0 dev lo table 123",
                "ip rule add from 127.0.0.1/8 fwmark 124 iif lo lookup 124",
                "ip route add local 0.0.0.0/0 dev lo table 124",
                "iptables -t mangle -A PREROUTING -m mark --mark 124 -j CONNMARK --save-mark",
                "iptables -t mangle -A OUTPUT -m connmark --mark 124 -j CONNMARK --restore-mark",
            ],
        ),
        (
            "mmproxy --allowed-networks n -l 10.0.0.1:1 -4 127.0.0.1:1 -6 [::1]:1",
            vec![
                "ip rule add fwmark 123 lookup 100",
                "ip -6 rule add fwmark 123 lookup 100",
                "ip route add local 0.0.0.0/0 dev lo table 100",
                "ip -6 route add local ::/0 dev lo table 100",
                "iptables -t mangle -I PREROUTING -m mark --mark 123 -m comment --comment mmproxy -j CONNMARK --save-mark",
                "ip6tables -t mangle -I OUTPUT -m connmark --mark 123 -m comment --comment mmproxy -j CONNMARK --restore-mark",
                // one fork's container set-up
                "iptables -t mangle -A OUTPUT -m mark --mark 123 -j MARK --set-mark 0",
            ],
        ),
    ] {
        for command in &commands {
            wks.run(command);
        }
        let listed = stdout(&ctl(&wks, &format!("import go-mmproxy {source}")));
        let count = listed.matches(" del ").count() + listed.matches(" -D ").count();
        assert_eq!(count, commands.len(), "{listed}");
        let cleaned = stdout(&ctl(&wks, &format!("import --clean go-mmproxy {source}")));
        assert!(cleaned.contains("removed"), "{cleaned}");
        assert_eq!(kernel(&wks), before, "{source}");
    }
}

#[test]
fn json_compose_and_scripts() {
    let old = Old::new();
    let wks = &old.lab.wks;
    let json = wks.write(
        "mmproxy.json",
        "{\"router\": [\n  {\"from\": \"10.0.0.1:1\", \"to\": \"0.0.0.0:2\"}, // ssh\n], \"mark\": 5}",
    );
    let printed = stdout(&ctl(
        wks,
        &format!("import mmproxy-json {}", json.display()),
    ));
    assert!(printed.contains("mmproxy.json:2: {\"from\""), "{printed}");
    assert!(
        printed.contains("tcp-10.0.0.1-1\t5\t10.0.0.1:1\t127.0.0.1\t2\t-"),
        "{printed}"
    );

    let compose = wks.write(
        "compose.yml",
        "services:\n  relay:\n    command: ./go-mmproxy -l 10.0.0.1:1 -4 10.5.5.2:9000 -mark 6\n",
    );
    let printed = stdout(&ctl(wks, &format!("import compose {}", compose.display())));
    assert!(
        printed.contains("relay\t6\t10.0.0.1:1\t10.5.5.2\t9000"),
        "{printed}"
    );

    wks.write("old/config/pathways.conf", "123\n#125 ");
    wks.write(
        "old/config/instances.tsv",
        "# mine\nssh\t123\t10.0.0.1:2222\t127.0.0.1\t2200\t::1",
    );
    let dir = wks.dir().join("old");
    let written = stdout(&ctl(
        wks,
        &format!("import --write scripts {}", dir.display()),
    ));
    assert!(written.contains("allow.txt is missing"), "{written}");
    let text = std::fs::read_to_string(wks.dir().join("etc/instances.tsv")).expect("written");
    assert!(
        text.ends_with("# mine\nssh\t123\t10.0.0.1:2222\t127.0.0.1\t2200\t::1\n"),
        "{text}"
    );
    wks.write("etc/allow.txt", "10.0.0.2\n");
    stdout(&ctl(wks, "check"));
}

#[test]
fn what_is_not_there_is_said() {
    let host = Host::new("wks01");
    let plain = host.write("units/plain.service", "[Service]\nExecStart=/bin/true\n");
    let bad = host.write("bad.yml", "services: [\n");
    for (words, said) in [
        (format!("import units {}", plain.display()), "nothing there"),
        (
            "import units /does/not/exist.service".to_owned(),
            "cannot read",
        ),
        ("import go-mmproxy -nope".to_owned(), "unknown flag '-nope'"),
        (format!("import compose {}", bad.display()), "no YAML"),
        (
            "import mmproxy-json /does/not/exist".to_owned(),
            "cannot read",
        ),
        ("import scripts /does/not/exist".to_owned(), "cannot read"),
    ] {
        let output = ctl(&host, &words);
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words}: {shown}");
        assert!(shown.contains(said), "{words}: {shown}");
    }
}
