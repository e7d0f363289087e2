//! What concerns the whole host: switches of the kernel, firewalls, other programs that meddle.
//!
//! Reads only, and takes "cannot be seen" for an answer. Must not know: what it means.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::ifaddrs::getifaddrs;

use super::evidence::{CannotSpoof, Conntrack, Networkd};
use super::filters::{FilterRule, nftables, xtables};
use crate::model::Family;
use crate::socket;

/// Whether this process may and can spoof; `None` when it does.
pub fn cannot_spoof() -> Option<CannotSpoof> {
    let failure = socket::may_spoof().err()?;
    Some(CannotSpoof {
        operation: failure.operation.to_owned(),
        errno: failure.source.raw_os_error().unwrap_or(0),
    })
}

/// The addresses of this network namespace's interfaces; none where the kernel does not show them.
pub fn addresses() -> Vec<IpAddr> {
    let all = getifaddrs().into_iter().flatten();
    all.filter_map(|one| {
        let address = one.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    })
    .collect()
}

/// A switch of the kernel by its dotted name; an interface's name stands in its place with its dots.
pub fn sysctl(path: &[&str]) -> Option<String> {
    let path: PathBuf = Path::new("/proc/sys").join(path.join("/"));
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

/// The switches that a verdict may look at, by dotted name.
pub fn sysctls() -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let interfaces = fs::read_dir("/proc/sys/net/ipv4/conf");
    for interface in interfaces.into_iter().flatten().flatten() {
        let name = interface.file_name().to_string_lossy().into_owned();
        for switch in ["rp_filter", "src_valid_mark", "route_localnet"] {
            if let Some(value) = sysctl(&["net", "ipv4", "conf", &name, switch]) {
                all.insert(format!("net.ipv4.conf.{name}.{switch}"), value);
            }
        }
    }
    for name in ["all", "default", "lo"] {
        if let Some(value) = sysctl(&["net", "ipv6", "conf", name, "disable_ipv6"]) {
            all.insert(format!("net.ipv6.conf.{name}.disable_ipv6"), value);
        }
    }
    for switch in ["ip_local_port_range", "ip_forward"] {
        if let Some(value) = sysctl(&["net", "ipv4", switch]) {
            all.insert(format!("net.ipv4.{switch}"), value);
        }
    }
    all
}

/// Connection tracking's table.
pub fn conntrack() -> Option<Conntrack> {
    let number = |name| sysctl(&["net", "netfilter", name])?.parse().ok();
    Some(Conntrack {
        count: number("nf_conntrack_count")?,
        max: number("nf_conntrack_max")?,
    })
}

/// Packets that reverse-path filtering has dropped so far.
pub fn rp_filter_drops() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/netstat").unwrap_or_default();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return 0;
    };
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    let value = pairs.find(|(name, _)| *name == "IPReversePathFilter");
    value.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
}

/// Every firewall's lines, and what could not be read.
pub fn filters() -> (Vec<FilterRule>, Vec<String>) {
    let mut rules = Vec::new();
    let mut unseen = Vec::new();
    let mut known = BTreeSet::new();
    for (family, name, legacy_names) in [
        (Family::V4, "iptables", "ip_tables_names"),
        (Family::V6, "ip6tables", "ip6_tables_names"),
    ] {
        let legacy_path = format!("/proc/thread-self/net/{legacy_names}");
        // asking legacy for a table makes the table, and only root may ask which there are
        let has_legacy =
            fs::read_to_string(legacy_path).is_ok_and(|names| !names.trim().is_empty());
        let plain_is_legacy = version(name).is_some_and(|version| !version.contains("nf_tables"));
        for (program, legacy) in [
            (name.to_owned(), plain_is_legacy),
            (format!("{name}-legacy"), true),
        ] {
            if (legacy && !has_legacy) || (program != name && plain_is_legacy) {
                continue;
            }
            match run(&format!("{program}-save"), &["-c"]) {
                Ok(text) => {
                    let read = xtables::parse(&program, family, &text);
                    if !legacy {
                        let tables = text.lines().filter_map(|line| line.strip_prefix('*'));
                        let of = if family == Family::V4 { "ip" } else { "ip6" };
                        known.extend(tables.map(|table| (of.to_owned(), table.to_owned())));
                    }
                    rules.extend(read);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => unseen.push(format!("{program}-save: {error}")),
            }
        }
    }
    match run("nft", &["-j", "list", "ruleset"]) {
        Ok(json) => rules.extend(nftables::parse(&json, &known)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            unseen.push("rules of nftables: nft is not installed".to_owned());
        }
        Err(error) => unseen.push(format!("nft list ruleset: {error}")),
    }
    (rules, unseen)
}

fn version(program: &str) -> Option<String> {
    run(program, &["--version"]).ok()
}

/// The output of a program that is in PATH or where administrators' programs are.
fn run(program: &str, arguments: &[&str]) -> io::Result<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program));
    let found = directories.into_iter().find(|file| file.is_file());
    let output = Command::new(found.ok_or(io::ErrorKind::NotFound)?)
        .args(arguments)
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(
        said.lines().next().unwrap_or("failed").to_owned(),
    ))
}

/// The running systemd-networkd of this network namespace and what it is told about others' rules.
pub fn networkd() -> Option<Networkd> {
    let here = fs::read_link("/proc/thread-self/ns/net").ok()?;
    let pid = fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        // the kernel keeps 15 bytes of a name
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        let same = || fs::read_link(entry.path().join("ns/net")).ok() == Some(here.clone());
        (name.trim() == "systemd-network" && same()).then_some(pid)
    })?;
    let settings = networkd_settings(Path::new("/"));
    let removes = |key: &str| settings.get(key).is_none_or(|value| is_true(value));
    Some(Networkd {
        pid,
        removes_rules: removes("ManageForeignRoutingPolicyRules"),
        removes_routes: removes("ManageForeignRoutes"),
    })
}

fn is_true(value: &str) -> bool {
    matches!(
        value.to_ascii_lowercase().as_str(),
        "1" | "yes" | "y" | "true" | "t" | "on"
    )
}

/// `networkd.conf` and its drop-ins: a drop-in's name counts once, that of /etc before /run before
/// /usr; the last in the order of names wins.
fn networkd_settings(root: &Path) -> BTreeMap<String, String> {
    let directories = ["etc", "run", "usr/local/lib", "usr/lib", "lib"];
    let mut drop_ins = BTreeMap::new();
    for directory in directories {
        let directory = root.join(directory).join("systemd/networkd.conf.d");
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|end| end == "conf") {
                drop_ins.entry(entry.file_name()).or_insert(entry.path());
            }
        }
    }
    let main = directories.map(|directory| root.join(directory).join("systemd/networkd.conf"));
    let main = main.into_iter().find(|path| path.exists());
    let mut settings = BTreeMap::new();
    for path in main.into_iter().chain(drop_ins.into_values()) {
        let text = fs::read_to_string(path).unwrap_or_default();
        let mut section = "";
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
            } else if let (Some((key, value)), "[Network]") = (line.split_once('='), section)
                && !line.starts_with(['#', ';'])
            {
                settings.insert(key.trim().to_owned(), value.trim().to_owned());
            }
        }
    }
    settings
}

/// How many descriptors a process may open, and how many it may give itself: its soft and hard limit.
pub fn descriptor_limits(pid: u32) -> Option<(u64, u64)> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))?;
    let mut words = line.split_whitespace().skip(3);
    let mut limit = || {
        let word = words.next()?;
        let unlimited = (word == "unlimited").then_some(u64::MAX);
        word.parse().ok().or(unlimited)
    };
    Some((limit()?, limit()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drop_ins_of_networkd_are_read_in_its_order() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let key = "ManageForeignRoutes";
        let of = || networkd_settings(root.path()).get(key).cloned();
        assert_eq!(of(), None);
        write(
            "etc/systemd/networkd.conf",
            "[Network]\n#ManageForeignRoutes=no\n",
        );
        assert_eq!(of(), None);
        write(
            "usr/lib/systemd/networkd.conf.d/a.conf",
            "[Network]\nManageForeignRoutes = no\n",
        );
        assert_eq!(of().as_deref(), Some("no"));
        write(
            "etc/systemd/networkd.conf.d/a.conf",
            "[Network]\nManageForeignRoutes=yes\n",
        );
        assert_eq!(of().as_deref(), Some("yes"));
        write(
            "run/systemd/networkd.conf.d/b.conf",
            "[DHCPv4]\nManageForeignRoutes=off\n",
        );
        assert_eq!(of().as_deref(), Some("yes"));
    }
}
