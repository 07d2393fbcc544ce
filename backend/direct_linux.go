package backend

import (
	"errors"
	"io"
	"reflect"
	"sync"

	"golang.org/x/sys/unix"
)

// direct is the state of a file opened with O_DIRECT.
//
// The kernel demands that offset, length and memory address are multiples of
// an alignment. Whatever is not goes through an aligned buffer. An unaligned
// write has to read what surrounds it, change it and write it back; for that
// it holds mu exclusively, and everything else that changes the file holds mu
// shared, so nothing is put back that was changed meanwhile. An unaligned
// write behind the end makes the file longer than it should be, by zeros of
// less than one alignment unit, until it is cut again before mu is released:
// after a power cut between the two the file may stay that much longer.
type direct struct {
	mu   sync.RWMutex
	mem  int64 // alignment of addresses, a power of two
	unit int64 // alignment of offsets and lengths, a power of two
	pool sync.Pool
}

// bounceSize is the length of a bounce buffer, a multiple of any unit.
const bounceSize = 1 << 20

// maxUnit is the largest alignment that is believed.
const maxUnit = 64 << 10

// initDirect asks statx(2) for the alignments (Linux 6.1), else assumes 4096,
// which suits every disk on the market.
func (o *osFile) initDirect() error {
	d := &direct{mem: 4096, unit: 4096}
	err := o.control(func(fd int) error {
		var stx unix.Statx_t
		err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx)
		if err != nil || stx.Mask&unix.STATX_DIOALIGN == 0 {
			return nil
		}
		mem, unit := int64(stx.Dio_mem_align), int64(stx.Dio_offset_align)
		if mem == 0 || unit == 0 {
			return errors.ErrUnsupported // says statx(2)
		}
		if mem&(mem-1) != 0 || unit&(unit-1) != 0 || mem > maxUnit || unit > maxUnit {
			return errors.ErrUnsupported
		}
		d.mem, d.unit = mem, unit
		return nil
	})
	if err != nil {
		return err
	}
	d.pool.New = func() any {
		b := make([]byte, bounceSize+maxUnit)
		skip := (-address(b)) & (maxUnit - 1)
		b = b[skip : skip+bounceSize : skip+bounceSize]
		return &b
	}
	o.direct = d
	return nil
}

// address is where p lies in memory; only its low bits are of interest.
func address(p []byte) int64 { return int64(reflect.ValueOf(p).Pointer()) }

func (d *direct) aligned(p []byte, off int64) bool {
	return (off|int64(len(p)))&(d.unit-1) == 0 && address(p)&(d.mem-1) == 0
}

func (o *osFile) directReadAt(p []byte, off int64) (int, error) {
	d := o.direct
	if off < 0 || len(p) == 0 {
		return o.f.ReadAt(p, off)
	}
	if d.aligned(p, off) {
		return o.readAligned(p, off)
	}
	b := d.pool.Get().(*[]byte)
	defer d.pool.Put(b)
	done := 0
	for done < len(p) {
		skip := (off + int64(done)) & (d.unit - 1)
		want := min(int64(len(p)-done), bounceSize-skip)
		n, err := o.readAligned((*b)[:up(skip+want, d.unit)], off+int64(done)-skip)
		c := 0
		if int64(n) > skip {
			c = copy(p[done:], (*b)[skip:n])
			done += c
		}
		if int64(c) < want {
			return done, err
		}
	}
	return done, nil
}

// readAligned reads until p is full, the end (io.EOF) or an error. A read
// that stops at the unaligned end of the file has reached the end: the next
// one would start at an unaligned offset, which the kernel refuses.
func (o *osFile) readAligned(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		var n int
		err := o.control(func(fd int) (err error) {
			n, err = unix.Pread(fd, p[done:], off+int64(done))
			return err
		})
		if err != nil {
			return done, pathErr("read", o.name, err)
		}
		done += n
		if n == 0 || int64(n)&(o.direct.unit-1) != 0 {
			break
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

func up(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }

func (o *osFile) directReadvAt(bufs [][]byte, off int64) (int, error) {
	done := 0
	for _, p := range bufs {
		n, err := o.directReadAt(p, off+int64(done))
		done += n
		if n < len(p) {
			return done, err
		}
	}
	return done, nil
}

func (o *osFile) directWriteAt(p []byte, off int64) (int, error) {
	d := o.direct
	if off < 0 || len(p) == 0 {
		return o.f.WriteAt(p, off)
	}
	if d.aligned(p, off) {
		d.mu.RLock()
		defer d.mu.RUnlock()
		return o.f.WriteAt(p, off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	b := d.pool.Get().(*[]byte)
	defer d.pool.Put(b)
	done := 0
	for done < len(p) {
		at := off + int64(done)
		skip := at & (d.unit - 1)
		n := min(int64(len(p)-done), bounceSize-skip)
		if err := o.modify((*b)[:up(skip+n, d.unit)], at-skip, skip, p[done:done+int(n)]); err != nil {
			return done, err
		}
		done += int(n)
	}
	return done, nil
}

// modify replaces part of the aligned range of len(b) bytes at base: p goes to
// base+skip. The caller holds mu exclusively.
func (o *osFile) modify(b []byte, base, skip int64, p []byte) error {
	unit := o.direct.unit
	size, err := o.size()
	if err != nil {
		return err
	}
	end := base + skip + int64(len(p))
	last := int64(len(b)) - unit
	if skip > 0 {
		if err := o.readUnit(b[:unit], base); err != nil {
			return err
		}
	}
	if end&(unit-1) != 0 && (last > 0 || skip == 0) {
		if err := o.readUnit(b[last:], base+last); err != nil {
			return err
		}
	}
	copy(b[skip:], p)
	// On a block device whose length is no multiple of unit (it never is
	// smaller than a sector) the last unit is written as far as it goes.
	if o.block {
		b = b[:min(int64(len(b)), max(size-base, 0))]
		if end > size {
			return pathErr("write", o.name, unix.ENOSPC)
		}
	}
	_, err = o.f.WriteAt(b, base)
	if length := max(size, end); !o.block && base+int64(len(b)) > length {
		// Also after an error: part of it may have been written.
		if terr := o.truncate(length); err == nil {
			err = terr
		}
	}
	return err
}

// readUnit reads one unit; behind the end of the file it is zeros.
func (o *osFile) readUnit(b []byte, off int64) error {
	n, err := o.readAligned(b, off)
	if err == io.EOF {
		err = nil
	}
	clear(b[n:])
	return err
}

// directWritevAt gathers bufs, so that buffers that are unaligned one by one
// still make large aligned writes.
func (o *osFile) directWritevAt(bufs [][]byte, off int64) (int, error) {
	if len(bufs) == 1 {
		return o.directWriteAt(bufs[0], off)
	}
	b := o.direct.pool.Get().(*[]byte)
	defer o.direct.pool.Put(b)
	done, fill := 0, 0
	flush := func() error {
		n, err := o.directWriteAt((*b)[:fill], off+int64(done))
		done += n
		fill = 0
		return err
	}
	for _, p := range bufs {
		for len(p) > 0 {
			n := copy((*b)[fill:], p)
			fill += n
			p = p[n:]
			if fill == len(*b) {
				if err := flush(); err != nil {
					return done, err
				}
			}
		}
	}
	if fill == 0 {
		return done, nil
	}
	return done, flush()
}
