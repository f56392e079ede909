"""By which tests each known failure of overlays is proved not to happen here, or why it is not.

``python -m tests.faults.coverage`` writes the table into ``README.md``; a test holds it true.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tests.faults.registry import FAULTS

README = Path(__file__).with_name("README.md")
SUITE = "tests/faults/test_faults.py::test_what_a_fault_breaks_is_whole_again_and_what_others_have_is_untouched"


class Proof(NamedTuple):
    """What stands behind one failure."""

    title: str
    tests: tuple[str, ...] = ()
    """``file::test`` below ``tests/``; the faults of the registry come by themselves."""
    note: str = ""
    """What is not covered, and why."""


E2E = "netns/test_end_to_end.py"
PROOFS = {
    "F01": Proof(
        "MTU smaller somewhere on the path",
        ("unit/test_vxlan.py::test_the_configured_mtu_is_the_underlays_not_the_devices",),
        "The key `MTU` is there; a path's MTU is not measured yet, so nothing notices a smaller hop by itself.",
    ),
    "F02": Proof(
        "MTU change not applied",
        ("netns/test_damage.py::test_a_smaller_underlay_mtu_is_followed_by_device_and_subnet_env",),
    ),
    "F03": Proof(
        "checksum offload corrupts vxlan",
        (
            "netns/test_checksums.py::test_nat_of_tunnel_packets_spoils_no_connection_for_long",
            "netns/test_checksums.py::test_the_setting_is_kept_through_whatever_happens_to_the_device",
            "netns/test_checksums.py::test_wrong_checksums_from_elsewhere_are_told_with_their_remedy",
        ),
        "NAT on the way and cards that compute wrong are told by the receiver, not avoided: `TxChecksum` is for them.",
    ),
    "F04": Proof(
        "MAC of the device changed by host tools",
        (
            "netns/test_damage.py::test_a_disturbance_heals_while_a_ping_runs",
            "unit/test_vxlan_backend.py::test_without_a_device_the_mac_comes_from_the_identity_and_the_name",
        ),
    ),
    "F05": Proof(
        "stale entries for a host whose address or MAC changed",
        (
            "scenario/test_vxlan.py::test_tables_equal_the_leases_whatever_the_way",
            "netns/test_host_gw_lab.py::test_a_peer_at_a_new_address_is_followed",
        ),
    ),
    "F06": Proof(
        "misses lose packets or overflow the neighbour table",
        (
            "netns/test_misses.py::test_the_first_packet_to_a_peer_that_is_not_in_the_tables_arrives",
            "netns/test_misses.py::test_a_thousand_packets_that_wait_for_one_answer_all_leave_in_order",
            "netns/test_misses.py::test_a_scan_of_the_whole_network_leaves_a_handful_of_routes_and_room_for_new_neighbours",
            "netns/test_misses.py::test_idle_peers_above_the_bound_are_paged_out_under_traffic_without_loss",
        ),
    ),
    "F07": Proof(
        "masquerade rule lost",
        (
            "netns/test_nft.py::test_twenty_flushes_in_a_row_are_each_repaired_by_event",
            "netns/test_iptables.py::test_whatever_others_do_to_our_rules_is_undone_exactly",
            "netns/test_iptables.py::test_the_number_of_rules_is_stable_over_many_repairs",
        ),
    ),
    "F08": Proof(
        "FORWARD policy DROP",
        (
            "netns/test_iptables.py::TestPackets::test_a_pod_elsewhere_to_own_pod_keeps_its_source",
            "netns/test_iptables.py::test_without_forward_rules_a_dropping_policy_stops_overlay_traffic",
            "netns/test_foreign_drop.py::test_a_chain_that_drops_whatever_we_accept_is_named",
            "netns/test_foreign_drop.py::test_an_operator_reads_in_the_status_who_drops_and_when_it_is_over",
        ),
        "Rules of legacy iptables tables are not looked at.",
    ),
    "F09": Proof(
        "iptables-legacy and nft mixed",
        (
            "netns/test_iptables.py::test_our_rules_end_up_in_the_hosts_variant_only",
            "netns/test_iptables.py::test_others_rules_in_the_other_variant_are_left_and_warned_of_once",
        ),
    ),
    "F10": Proof("UDP port closed or eaten", note="Peers are not probed yet."),
    "F11": Proof(
        "wrong NAT",
        (
            "netns/test_iptables.py::TestPackets::test_marked_packets_keep_their_source",
            "netns/test_nft.py::TestPackets::test_host_to_overlay_from_its_underlay_address_is_masqueraded",
        ),
    ),
    "F12": Proof(
        "--random-fully",
        (
            "netns/test_iptables.py::test_without_random_fully_in_the_tool_rules_are_set_without_it",
            "netns/test_iptables.py::test_a_kernel_that_forgets_random_fully_does_not_make_rules_flap",
            "netns/test_nft.py::test_without_fully_random_in_the_tool_rules_are_set_without_it",
        ),
    ),
    "F13": Proof(
        "node removed, state stays",
        (
            f"{E2E}::test_a_lease_removed_while_the_daemon_was_dead_leaves_nothing_behind",
            "scenario/test_vxlan.py::test_restart_with_other_leases_leaves_nothing_stale",
        ),
    ),
    "F14": Proof(
        "own subnet routed to another host",
        ("netns/test_hostile_leases.py::test_each_bad_lease_costs_one_line_and_nobody_a_packet",),
    ),
    "F15": Proof(
        "host-gw route wrong, or lost on a link flap",
        (
            "netns/test_host_gw_lab.py::test_a_deleted_or_bent_route_is_put_right_while_a_ping_runs",
            "netns/test_host_gw_lab.py::test_routes_are_back_when_the_underlay_is",
        ),
    ),
    "F16": Proof(
        "etcd loses data",
        (
            "netns/test_cold_start.py::test_etcd_wiped_while_all_hosts_were_down_gets_its_leases_back",
            "interop/test_etcd_keep.py::test_a_rebuilt_etcd_gets_all_leases_back_and_no_peer_is_forgotten_meanwhile",
            "interop/test_crowd.py::test_a_wiped_store_gets_two_hundred_leases_back_before_a_newcomer_gets_any_of_them",
        ),
    ),
    "F17": Proof(
        "restart while the store is unreachable",
        (
            "netns/test_cold_start.py::test_reboot_with_etcd_down_gives_the_same_subnets_and_the_full_mesh",
            "netns/test_cold_start.py::test_restart_with_etcd_down_loses_nothing",
            "netns/test_store_returns.py::"
            "test_a_state_directory_on_a_disk_that_takes_nothing_is_told_and_the_host_works",
        ),
    ),
    "F18": Proof(
        "lease lost, or two owners",
        (
            "model/test_lease_protocol.py::test_no_interleaving_breaks_a_rule_and_all_come_to_rest",
            "netns/test_fencing_lab.py::test_a_host_whose_lease_was_stolen_sends_nothing_of_it_and_comes_back",
        ),
    ),
    "F19": Proof(
        "two nodes with one public address",
        (
            "interop/test_etcd_acquire.py::test_another_machine_with_our_address_keeps_its_lease_and_we_say_so",
            "interop/test_fencing.py::test_two_clones_with_subnets_of_their_own_come_to_know_it_and_the_younger_gives_way",
            "interop/test_fencing.py::"
            "test_clones_that_both_started_from_one_memory_share_no_subnet_when_the_store_is_back",
        ),
    ),
    "F20": Proof(
        "different backends ignore each other",
        ("unit/test_fold.py::test_a_lease_that_cannot_be_used_is_told_in_a_sentence",),
        "Said in one line, not solved: changing the backend of a running cluster is not built yet.",
    ),
    "F21": Proof(
        "second daemon overwrites the first",
        (
            "netns/test_two_daemons.py::test_second_daemon_with_the_firsts_subnet_file_or_device_is_refused",
            "unit/test_vxlan_backend.py::test_a_device_of_another_network_is_refused_with_the_remedy",
        ),
    ),
    "F22": Proof(
        "pod network overlaps the host's networks",
        (
            "netns/test_overlap.py::test_an_underlay_in_the_network_is_refused_before_anything_is_touched",
            "netns/test_overlap.py::test_a_store_that_our_routes_would_take_away_is_named",
            "netns/test_overlap.py::test_another_network_that_comes_later_is_told_while_it_lasts_and_ends_nothing",
            "unit/test_overlap.py::test_a_host_that_served_the_network_before_is_told_and_not_turned_away",
        ),
    ),
    "F23": Proof(
        "lease timer and clocks",
        (
            "interop/test_etcd_keep.py::test_a_machine_that_slept_past_its_renewal_renews_when_it_wakes",
            "netns/test_fencing_lab.py::test_a_lease_that_ran_out_while_its_host_was_away_is_kept_when_nobody_took_it",
        ),
    ),
    "F24": Proof(
        "large clusters",
        (
            f"{E2E}::test_twenty_daemons_started_at_once_get_twenty_subnets",
            "interop/test_etcd_follow.py::test_many_leases_are_decoded_without_stopping_the_loop",
            "netns/test_misses.py::test_questions_asked_while_nobody_listened_are_answered_after_an_overrun",
        ),
        "5000 to 50 000 leases are measured, not tested: `make bench`.",
    ),
    "F25": Proof(
        "boot storm for subnets",
        ("interop/test_etcd_acquire.py::test_twenty_hosts_at_once_get_the_twenty_subnets_there_are",),
    ),
    "F26": Proof(
        "compaction and reconnect loops",
        (
            "interop/test_etcd_follow.py::test_what_happened_in_compacted_history_is_found_by_comparing",
            "interop/test_etcd_client.py::test_an_etcd_that_accepts_and_drops_us_in_a_circle_is_met_with_growing_pauses",
        ),
    ),
    "F27": Proof(
        "out of subnets",
        (
            "interop/test_etcd_acquire.py::test_a_full_network_is_waited_for_with_one_line",
            "unit/test_room.py::test_at_eighty_percent_it_is_told_once_and_when_it_is_full_again",
            "interop/test_leases_command.py::TestRelease::test_gc_takes_what_was_not_renewed_in_time_and_nothing_else",
        ),
        "Leases live a day, as flannel's; there is no shorter one to choose.",
    ),
    "F28": Proof(
        "certificates rotated or expired",
        (
            "interop/test_etcd_access.py::test_a_running_watch_survives_a_change_of_ca_and_certificates",
            "unit/test_expiry.py::test_one_that_ends_soon_is_named_with_file_day_and_remedy",
        ),
    ),
    "F29": Proof(
        "partial failure of etcd",
        (
            "interop/test_etcd_failover.py::test_a_request_to_a_hanging_member_is_answered_by_another_and_takes_the_watch_along",
            "interop/test_etcd_failover.py::test_without_quorum_requests_fail_in_time_and_the_watch_goes_on_afterwards",
            "faults/test_chaos.py::test_a_cluster_survives_faults_at_random",
        ),
    ),
    "F30": Proof(
        "device deleted, down, or its parent made anew",
        (
            "netns/test_damage.py::test_a_disturbance_heals_while_a_ping_runs",
            "scenario/test_vxlan.py::test_damage_is_undone_in_one_cycle",
        ),
    ),
    "F31": Proof(
        "host tools grab our device",
        (
            "netns/test_drift_e2e.py::test_each_entry_comes_back_within_two_pings_and_is_told_with_old_and_new",
            "netns/test_audit.py::test_a_program_that_undoes_every_repair_is_held_back_named_and_shown",
            "netns/test_settings.py::TestHost::test_forwarding_that_is_switched_off_is_told_with_the_remedy_and_left_to_"
            "the_operator",
        ),
    ),
    "F32": Proof("wrong interface chosen", ("netns/test_extiface.py::test_chosen_on_a_real_host",)),
    "F33": Proof(
        "address of a node changes",
        ("netns/test_damage.py::test_a_new_underlay_address_is_published_and_peers_follow",),
    ),
    "F34": Proof(
        "nodes behind NAT",
        ("unit/test_extiface.py::TestFollow::test_advertised_address_of_a_nat_stays",),
        "`--public-ip` and the interface's own address are separate; the address that others see is not learned.",
    ),
    "F35": Proof(
        "subnet.env missing, partial or stale",
        (
            "unit/test_subnet_file.py::TestUpdate::test_reader_in_a_loop_never_sees_a_missing_or_half_file",
            "netns/test_damage.py::test_a_deleted_subnet_file_is_back_within_a_second",
        ),
    ),
    "F36": Proof(
        "bridge still has the old subnet",
        ("unit/test_bridges.py::test_bridge_of_an_earlier_subnet_is_named_with_the_remedy",),
        "Named, with the remedy; nothing that containers hang on is changed.",
    ),
    "F37": Proof(
        "br_netfilter missing", ("netns/test_unwritable.py::test_hidden_br_netfilter_is_a_warning_and_nothing_more",)
    ),
    "F38": Proof(
        "xtables lock contention",
        (
            "netns/test_iptables.py::test_a_held_xtables_lock_delays_rules_but_not_the_daemon",
            "netns/test_iptables.py::test_programs_that_use_legacy_tables_all_the_time_are_followed_at_a_bounded_rate",
        ),
    ),
    "F39": Proof(
        "iptables processes eat memory",
        ("netns/test_iptables.py::test_quiet_ensure_changes_nothing_and_starts_no_process",),
        "Memory is measured by `make bench`.",
    ),
    "F40": Proof(
        "rules left after stop, or removed on stop",
        (
            f"{E2E}::test_sigterm_ends_a_daemon_within_5_seconds_and_leaves_the_data_path",
            "netns/test_cleanup.py::test_the_host_is_as_before_the_first_start",
        ),
    ),
    "F41": Proof(
        "process alive, network dead",
        (
            "netns/test_unwritable.py::test_problem_is_told_and_ends_by_itself",
            "unit/test_health.py::test_readiness_comes_and_goes_with_its_reasons",
        ),
    ),
    "F42": Proof(
        "order of start",
        (
            f"{E2E}::test_daemons_wait_for_an_etcd_that_is_not_there_yet",
            f"{E2E}::test_daemons_wait_for_a_network_configuration_that_is_not_there_yet",
            "netns/test_kube_lab.py::test_a_node_that_joins_later_and_gets_its_pod_cidr_later_still_is_connected",
        ),
    ),
    "F43": Proof(
        "IPv6 and dual stack",
        (f"{E2E}::test_every_pod_reaches_every_other_and_the_outside",),
        "The cluster `vxlan IPv6` has every fault of the device, too.",
    ),
    "F44": Proof("wireguard backend", note="There is no such backend yet."),
    "F45": Proof(
        "restart hurts traffic",
        (
            "netns/test_crash_safety.py::test_restarts_by_sigterm_and_sigkill_lose_no_packet_of_a_thousand_a_second",
            "netns/test_upgrade.py::test_upgrade_and_downgrade_host_by_host_keep_subnets_and_lose_no_ping",
        ),
    ),
    "F46": Proof("throughput", note="Measured by `make bench`; a figure of a shared machine is no test."),
}

HEAD = """\
# Which test stands for which failure

`failures` collects 46 ways in which overlays fail in production. This table says by which tests each is proved not to
happen here, or what is missing. *Faults* are those of `registry.py`: each is made in each of its clusters by

    {suite}

under a thousand packets a second. Afterwards the pods of all hosts reach each other, tables are what leases say, and a
snapshot of the host, others' things included, is what it was. `make faults` prints what each costs.

Written by `python -m tests.faults.coverage`.

| | failure | faults | other tests |
|---|---|---|---|
"""


def render() -> str:
    """The whole of ``README.md``."""
    lines = []
    for number, proof in PROOFS.items():
        faults = [f"{fault.name} ({', '.join(fault.cases)})" for fault in FAULTS if number in fault.failures]
        tests = [f"`{test}`" for test in proof.tests]
        beside = "<br>".join(filter(None, [*tests, proof.note]))
        lines.append(f"| {number} | {proof.title} | {'; '.join(faults)} | {beside} |")
    return HEAD.format(suite=SUITE.replace("::", "::\\\n        ")) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(render())
