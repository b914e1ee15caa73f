import time, sys
t=time.process_time()
from benchmarks.reports.predictions import *
from benchmarks.reports import predictions as P
print("import", time.process_time()-t)
training={}
for key in OPTIMIZER:
    t=time.process_time()
    s=count_training(Setup(PRESET,256),key)
    training[key]={256:s}
    print(key, time.process_time()-t, {n:(f"{c.flop/256e9:.1f} GF/img", f"{c.bytes/256e6:.1f} MB/img", len(c.kernels), c.dispatched, len(fused(c.kernels))) for n,c in s.steps.items()}, s.weights, flush=True)
    for g in GPUS:
        for row in ROWS:
            if row.split(",")[0]==key: print(g,row,s.images_per_second(GPUS[g],256,row))
for key in OPTIMIZER:
    c=count_sampling(key,(1,256))
    for n in c:
        print(key,n,c[n].flop/n/1e9,c[n].bytes/n/1e6,len(c[n].kernels),c[n].dispatched,[ (g,row,round(sampling_rate(c[n],GPUS[g],n,row))) for g in GPUS for row in ROWS if row.split(",")[0]==key],flush=True)
