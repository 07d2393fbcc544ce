package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ticksPerSecond is the unit of the times in /proc (USER_HZ), 100 on every
// Linux that Go runs on.
const ticksPerSecond = 100

// otherLoadLimit is the share of all processors beyond which what others did
// during a run makes the figure doubtful.
const otherLoadLimit = 0.10

// processCPU is the time that a process has used, all its threads together.
func processCPU(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseProcessStat(string(b))
}

// parseProcessStat reads utime and stime of /proc/PID/stat. The name of the
// process, in parentheses, may hold anything.
func parseProcessStat(s string) (time.Duration, error) {
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return 0, fmt.Errorf("process stat %q: no name", s)
	}
	f := strings.Fields(s[i+1:]) // begins with field 3, the state
	if len(f) < 13 {
		return 0, fmt.Errorf("process stat %q: too short", s)
	}
	var ticks int64
	for _, v := range f[11:13] {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("process stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / ticksPerSecond), nil
}

// peakRSS is the largest resident memory that a process has had, in bytes.
func peakRSS(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	return parseKiB(string(b), "VmHWM:")
}

// parseKiB finds a line "key n kB" and returns bytes.
func parseKiB(s, key string) (int64, error) {
	for line := range strings.Lines(s) {
		rest, ok := strings.CutPrefix(line, key)
		if !ok {
			continue
		}
		f := strings.Fields(rest)
		if len(f) != 2 || f[1] != "kB" {
			return 0, fmt.Errorf("%q: want a number of kB", line)
		}
		n, err := strconv.ParseInt(f[0], 10, 64)
		return n << 10, err
	}
	return 0, fmt.Errorf("no line %s", key)
}

// machineCPU is what all processors have done since the start, in ticks.
type machineCPU struct{ busy, total, steal int64 }

func readMachineCPU() (machineCPU, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return machineCPU{}, err
	}
	return parseMachineStat(string(b))
}

// parseMachineStat reads the first line of /proc/stat: user nice system idle
// iowait irq softirq steal (guest times are part of user and nice).
func parseMachineStat(s string) (machineCPU, error) {
	line, _, _ := strings.Cut(s, "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return machineCPU{}, fmt.Errorf("stat: %q: want the sum of all processors", line)
	}
	var m machineCPU
	for i, v := range f[1:9] {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return machineCPU{}, fmt.Errorf("stat: %w", err)
		}
		m.total += n
		switch i {
		case 3, 4: // idle, iowait
		case 7:
			m.steal += n
		default:
			m.busy += n
		}
	}
	return m, nil
}

// loadMeter measures what else went on during a run.
type loadMeter struct {
	start machineCPU
	self  time.Duration
}

func startLoadMeter() (*loadMeter, error) {
	m, err := readMachineCPU()
	if err != nil {
		return nil, err
	}
	return &loadMeter{start: m, self: selfCPU()}, nil
}

// stop returns the share of all processors that neither this program nor the
// named time (of fio and the server) accounts for, and the share that the
// hypervisor withheld. Kernel threads that work for the run (writeback, the
// loop driver) count as others: the figure is an upper bound.
func (l *loadMeter) stop(known time.Duration) (other, steal float64, err error) {
	end, err := readMachineCPU()
	if err != nil {
		return 0, 0, err
	}
	total := float64(end.total - l.start.total)
	if total <= 0 {
		return 0, 0, nil
	}
	known += selfCPU() - l.self
	busy := float64(end.busy-l.start.busy) - known.Seconds()*ticksPerSecond
	return max(0, busy/total), float64(end.steal-l.start.steal) / total, nil
}

// selfCPU is the time this process has used.
func selfCPU() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// loadAverage of the last minute.
func loadAverage() float64 {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	v, err := strconv.ParseFloat(f[0], 64)
	if err != nil {
		return 0
	}
	return v
}

// pageCacheBytes is the size of the page cache of the whole machine.
func pageCacheBytes() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	cached, err := parseKiB(string(b), "Cached:")
	if err != nil {
		return 0, err
	}
	buffers, err := parseKiB(string(b), "Buffers:")
	return cached + buffers, err
}

// settledMemory is how much of the page cache a run on a new image may fill,
// in bytes: more than this a host that collects free memory takes back before
// the run has begun.
const settledMemory = 1 << 30

// settleMemory fills n bytes of page cache with a file and forgets it again. In
// a virtual machine the first use of a page since the host last took it back
// costs ten times the write that needs it; without this, whoever happens to get
// such pages loses a run that fills the page cache. Anonymous memory does not
// do: it is freed in large blocks, which the page cache gets last. The pieces
// are as long as those that servers write, because the kernel takes a block of
// free memory about as large as what is written at a time.
func settleMemory(path string, n int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < n; {
		for _, piece := range []int64{64 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20} {
			if _, err := f.WriteAt(buf[:piece], off); err != nil {
				return err
			}
			off += piece
		}
	}
	return nil
}
