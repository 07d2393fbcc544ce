package fsck

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/imagestack/imagestack/layers/open"
)

// ErrUnstable says that a shared image was changed while it was read.
var ErrUnstable = errors.New("the metadata changes while it is read: another program is writing to the image")

// How often a shared image is read until two readings agree, and the pause in
// between, which is as long as a writer's burst may take.
const (
	shareTries = 5
	sharePause = 200 * time.Millisecond
)

// OpenDumpShared is OpenDump of an image that another program may be writing
// to: no lock is taken or respected. The metadata is read twice, and until two
// readings agree: what was there between the two is what a power cut would
// have left, and writers keep that in order. An image of which no two readings
// agree is refused with ErrUnstable. What the writer has only in memory is not
// in the dump.
func OpenDumpShared(ctx context.Context, path string, o open.Options) (*Dumped, error) {
	var last error
	for try := range shareTries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			case <-time.After(sharePause):
			}
		}
		d, err := openDump(ctx, path, o, true)
		if err != nil {
			last = err // perhaps torn
			continue
		}
		d.ID.Shared = true
		sum, err := d.digest(ctx)
		if err == nil {
			d.sum = sum
			err = d.sameAgain(ctx, path, o)
		}
		if err == nil {
			return d, nil
		}
		last = errors.Join(err, d.Close())
	}
	return nil, fmt.Errorf("%s: %w", path, last)
}

// sameAgain finds and reads the metadata once more, with nothing cached.
func (d *Dumped) sameAgain(ctx context.Context, path string, o open.Options) (err error) {
	e, err := openDump(ctx, path, o, true)
	if err != nil {
		return fmt.Errorf("%w (%w)", ErrUnstable, err)
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	e.ID.Shared = true
	sum, err := e.digest(ctx)
	if err == nil && !bytes.Equal(sum, d.sum) {
		err = ErrUnstable
	}
	return err
}

// digest is a hash of the metadata and of where it lies.
func (d *Dumped) digest(ctx context.Context) ([]byte, error) {
	h := sha256.New()
	buf := make([]byte, dumpPiece)
	for _, m := range d.meta {
		var head [17]byte
		binary.LittleEndian.PutUint64(head[:], uint64(m.off))
		binary.LittleEndian.PutUint64(head[8:], uint64(m.n))
		head[16] = byte(m.role)
		h.Write(head[:])
		for at := m.off; at < m.off+m.n; {
			if err := ctx.Err(); err != nil {
				return nil, context.Cause(ctx)
			}
			b := buf[:min(dumpPiece, m.off+m.n-at)]
			if err := readZero(d.f, b, at); err != nil {
				return nil, err
			}
			h.Write(b)
			at += int64(len(b))
		}
	}
	return h.Sum(nil), nil
}

// Unchanged makes sure that a shared image is still as it was when its
// metadata was found: what was written of it until then is then of one moment.
// It is nil for one that is locked.
func (d *Dumped) Unchanged(ctx context.Context) error {
	if !d.ID.Shared {
		return nil
	}
	sum, err := d.digest(ctx)
	if err == nil && !bytes.Equal(sum, d.sum) {
		err = ErrUnstable
	}
	return err
}
